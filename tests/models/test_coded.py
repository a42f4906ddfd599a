"""Codes with scales are read block by block as the values that transformers dequantizes them to, and by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path

import pytest
import torch
from mixtures import random_mixture
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from lqer.errors import ModelError
from lqer.models.coded import E2M1, Fp8, Mxfp4, blocks_of
from lqer.models.loaders import Streamed
from lqer.models.open import load_whole
from lqer.models.source import check_weights, resolve_model
from lqer.models.streaming import open_model
from lqer.models.structure import prepare_model

CPU = torch.device("cpu")
FILE = "model.safetensors"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router"]}
Tensors = dict[str, Tensor]


def fp8(block: tuple[int, int] | None) -> dict[str, object]:
    return {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}


def write(folder: Path, kind: str, encode: Callable[[Tensors], Tensors], quantization: object, **sizes: int) -> Path:
    """A mixture of `kind` in bfloat16 whose tensors `encode` changes."""
    random_mixture(kind, **sizes).to(torch.bfloat16).save_pretrained(folder)
    save_file(encode(load_file(folder / FILE)), folder / FILE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def to_fp8(rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    """Encodes every linear of the blocks, a scale for each block of that size."""

    def encode(tensors: Tensors) -> Tensors:
        generator, found = torch.Generator().manual_seed(0), dict(tensors)
        for name, weight in tensors.items():
            if ".layers." in name and name.endswith("proj.weight"):
                grid = [-(-size // block) for size, block in zip(weight.shape, (rows, columns), strict=True)]
                scales = torch.randint(118, 122, grid, generator=generator)
                exact = scales.to(torch.uint8) if scale_dtype is torch.uint8 else 1.1 * 2.0 ** (scales - 127)
                found[name] = (weight / 2**-8).to(torch.float8_e4m3fn)
                found[f"{name}_scale_inv"] = exact.to(scale_dtype)
        return found

    return encode


def to_mxfp4(tensors: Tensors) -> Tensors:
    """Encodes the stacks of experts: random codes and scales of their shapes."""
    generator, found = torch.Generator().manual_seed(0), dict(tensors)
    for name in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = found.pop(name).shape
        shape = (experts, rows, columns // 32)
        found[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        found[f"{name}_scales"] = torch.randint(110, 125, shape, generator=generator, dtype=torch.uint8)
    return found


def to_deepseek_v4(tensors: Tensors) -> Tensors:
    """As DeepSeek-V4 is published, names too: experts in FP4, a scale for 32 values, linears of attention in FP8."""
    generator, found = torch.Generator().manual_seed(0), dict(tensors)
    for name, weight in tensors.items():
        linear, _, leaf = name.rpartition(".")
        kind = linear.rpartition(".")[2]
        if leaf != "weight" or kind not in ("wq_a", "wq_b", "wo_a", "wo_b", "w1", "w2", "w3"):
            continue
        rows, columns = weight.shape
        grid = (rows, columns // 32) if ".experts." in name else (rows // 8, columns // 16)
        exponents = torch.randint(118, 122, grid, generator=generator).to(torch.uint8)
        found[f"{linear}.scale"] = exponents.view(torch.float8_e8m0fnu)
        if ".experts." in name:
            found[name] = torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8)
        else:
            found[name] = (weight / 2**-8).to(torch.float8_e4m3fn)
    renamed = {"model.": "", "embed_tokens.": "embed.", "hc_head.hc_": "hc_head_"}
    return {reduce(lambda name, pair: name.replace(*pair), renamed.items(), name): one for name, one in found.items()}


def of_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model that transformers dequantizes, its experts split as ours are."""
    quantization = AutoConfig.from_pretrained(folder).quantization_config
    config = Mxfp4Config if quantization["quant_method"] == "mxfp4" else FineGrainedFP8Config
    options = {key: value for key, value in quantization.items() if key != "quant_method"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config(dequantize=True, **options)
    )
    prepare_model(model)
    return model.eval()


def parameters_block_by_block(
    folder: Path, dtype: torch.dtype, device: torch.device = CPU
) -> Iterator[tuple[str, Tensor]]:
    opened = open_model(resolve_model(str(folder)), dtype, device)
    assert isinstance(opened.loader, Streamed)
    assert not hasattr(opened.model.config, "quantization_config")
    for index, block in opened.loader.load_each(opened.blocks, range(len(opened.blocks)), device):
        yield from ((f"{opened.name}.{index}.{name}", tensor.clone()) for name, tensor in block.named_parameters())
    opened.loader.load_outer()
    outside = (pair for pair in opened.model.named_parameters() if not pair[0].startswith(f"{opened.name}."))
    yield from outside


WAYS = {
    "mxfp4": ("gpt_oss", to_mxfp4, MXFP4, {"hidden_size": 64, "intermediate_size": 32}),
    "fp8": ("qwen3_moe", to_fp8(16, 16), fp8((16, 16)), {}),
    "fp8 with exponents": ("qwen3_moe", to_fp8(16, 16, torch.uint8), fp8((16, 16)), {}),
    "fp8, one scale a matrix": ("qwen3_moe", to_fp8(999, 999), fp8(None), {}),
    "fp8 of latent attention": ("deepseek_v3", to_fp8(8, 16), fp8((8, 16)), {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_codes_are_read_block_by_block_as_transformers_dequantizes_them(way, dtype, tmp_path):
    kind, encode, quantization, sizes = WAYS[way]
    folder = write(tmp_path, kind, encode, quantization, **sizes)
    expected = dict(of_transformers(folder, dtype).named_parameters())
    read = dict(parameters_block_by_block(folder, dtype))
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_deepseek_v4_is_read_as_it_is_published(tmp_path):
    """In bfloat16 alone, since transformers decodes its experts to no other dtype."""
    folder = write(tmp_path, "deepseek_v4", to_deepseek_v4, fp8((8, 16)) | {"scale_fmt": "ue8m0"})
    stored = {str(tensor.dtype) for tensor in load_file(folder / FILE).values()}
    assert stored >= {"torch.int8", "torch.float8_e4m3fn", "torch.float8_e8m0fnu"}
    expected = dict(of_transformers(folder, torch.bfloat16).named_parameters())
    read = dict(parameters_block_by_block(folder, torch.bfloat16))
    assert read.keys() == expected.keys()
    assert {"model.layers.0.self_attn.o_a_proj.0.weight", "model.layers.0.self_attn.o_a_proj.1.weight"} < read.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_decodes_to_the_same_values(way, tmp_path):
    kind, encode, quantization, sizes = WAYS[way]
    folder = write(tmp_path, kind, encode, quantization, **sizes)
    expected = dict(parameters_block_by_block(folder, torch.bfloat16))
    for name, tensor in parameters_block_by_block(folder, torch.bfloat16, torch.device("cuda")):
        assert torch.equal(tensor.cpu(), expected[name]), name


def test_a_model_loaded_whole_has_the_same_values(tmp_path):
    folder = write(tmp_path, "gpt_oss", to_mxfp4, MXFP4, hidden_size=64, intermediate_size=32)
    whole = load_whole(resolve_model(str(folder)), torch.bfloat16, CPU)
    for name, tensor in parameters_block_by_block(folder, torch.bfloat16):
        assert torch.equal(tensor, whole.get_parameter(name)), name


def test_scales_may_be_in_another_file_than_their_codes(tmp_path):
    folder = write(tmp_path, "qwen3_moe", to_fp8(16, 16), fp8((16, 16)))
    expected = dict(parameters_block_by_block(folder, torch.float32))
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    files = {name: f"{'scales' if name.endswith('_scale_inv') else 'codes'}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file, {"format": "pt"})
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for name, tensor in parameters_block_by_block(folder, torch.float32):
        assert torch.equal(tensor, expected[name]), name


class TestBlocksOfFp8:
    def test_are_cut_off_at_the_edge_of_the_matrix(self):
        """As DeepSeek-V3's kv_a_proj_with_mqa, 576 rows in blocks of 128, here 5 rows and 3 columns in blocks of 2."""
        codes_OI = torch.ones(5, 3).to(torch.float8_e4m3fn)
        scales_GH = torch.arange(6.0).view(3, 2)
        expected_OI = torch.tensor([[0, 0, 1], [0, 0, 1], [2, 2, 3], [2, 2, 3], [4, 4, 5]])
        assert torch.equal(Fp8((2, 2)).decode(codes_OI, scales_GH, None), expected_OI.float())

    def test_are_those_of_the_configuration_even_where_the_scales_divide_the_matrix_otherwise(self):
        assert blocks_of((192, 256), (2, 2), (128, 128)) == (128, 128)

    def test_follow_from_the_scales_where_the_configuration_has_others(self):
        assert blocks_of((64, 64), (64, 2), (128, 128)) == (1, 32)

    def test_are_refused_where_they_do_not_fit(self, tmp_path):
        folder = write(tmp_path, "qwen3_moe", to_fp8(7, 16), fp8((16, 16)))
        with pytest.raises(ModelError, match=r"down_proj\.weight: scales of shape .* do not match codes of shape"):
            check_weights(resolve_model(str(folder)))

    def test_without_scales_are_refused_by_name(self, tmp_path):
        def without_one(tensors: Tensors) -> Tensors:
            found = to_fp8(16, 16)(tensors)
            del found["model.layers.1.self_attn.k_proj.weight_scale_inv"]
            return found

        folder = write(tmp_path, "qwen3_moe", without_one, fp8((16, 16)))
        with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj\.weight of .* is stored as F8_E4M3"):
            check_weights(resolve_model(str(folder)))


def test_scales_of_mxfp4_of_another_shape_are_refused(tmp_path):
    def shortened(tensors: Tensors) -> Tensors:
        found = to_mxfp4(tensors)
        name = "model.layers.0.mlp.experts.down_proj_scales"
        return found | {name: found[name][:, :-1].contiguous()}

    folder = write(tmp_path, "gpt_oss", shortened, MXFP4, hidden_size=64, intermediate_size=32)
    with pytest.raises(ModelError, match=r"down_proj_scales has shape \[4, 63, 1\], and .*down_proj_blocks \[4, 64,"):
        check_weights(resolve_model(str(folder)))


def test_codes_of_mxfp4_are_those_of_ocp():
    bytes_in_order = [low | low + 1 << 4 for low in range(0, 16, 2)]
    codes = torch.tensor(2 * bytes_in_order, dtype=torch.uint8).view(1, 1, 1, 16)
    values = Mxfp4().decode(codes, torch.full((1, 1, 1), 129, dtype=torch.uint8), None)
    assert torch.equal(values.flatten(), 4 * torch.tensor(2 * E2M1))
