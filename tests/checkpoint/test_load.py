"""A checkpoint, written and loaded again, against the same computation on the original model in memory."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import all_sites
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from lqer.checkpoint.load import load_quantized
from lqer.checkpoint.pack import DETAILS_FILE, OUTSIDE_FILE
from lqer.errors import ModelError
from lqer.formats import E8P, MXInt, Passthrough, Trellis
from lqer.methods import QeraExact, RoundingOnly
from lqer.models.source import load_model, resolve_model
from lqer.nn.attention import QuantizedAttention, quantize_attention
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.rounding import Ldlq
from lqer.store.names import CHECKPOINT_LINK, block_file
from lqer.transforms import Hadamard

CPU = torch.device("cpu")
RANK = 8


def plain_plan(plan, dtype: str = "float32"):
    """Nothing rounded, nothing reconstructed."""
    return replace(plan, method=RoundingOnly(), weight=Passthrough(dtype), rank=0)


def in_stored_dtype(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model as saved, loaded in the checkpoint's own dtype (to be quantized) and in float32 (to compare with)."""
    model.save_pretrained(folder)
    source = resolve_model(str(folder))
    return load_model(source, "auto", CPU), load_model(source, torch.float32, CPU)


def l2qer_weight(weight_OI: Tensor, mean_abs_I: Tensor, round_mxint) -> Tensor:
    """W_q + (A·B)ᵀ with everything in 8-bit MXINT, the factors from a full SVD in float64."""
    rounded_OI = round_mxint(weight_OI, 8)
    scale_I = mean_abs_I.double().clamp(min=1e-4)
    scale_I = scale_I / (scale_I.min() * scale_I.max()).sqrt()
    u, sigma, vt = torch.linalg.svd(scale_I[:, None] * (weight_OI.double() - rounded_OI).T, full_matrices=False)
    a_IR = round_mxint(u[:, :RANK] / scale_I[:, None], 8, axis=0)
    b_RO = round_mxint(sigma[:RANK, None] * vt[:RANK], 8, axis=0)
    return rounded_OI + (a_IR @ b_RO).T


@torch.no_grad()
def test_it_computes_what_the_model_with_effective_weights_computes(stages, round_mxint, windows_WT):
    sites = all_sites(stages.calibration)
    expected = copy.deepcopy(stages.model)
    for i in range(stages.details["blocks"]["count"]):
        statistics = stages.calibration.tensors(block_file(i))
        for name in stages.details["linears"]:
            if name.startswith(f"{stages.details['blocks']['name']}.{i}."):
                linear = expected.get_submodule(name)
                linear.weight.copy_(l2qer_weight(linear.weight, statistics[f"{sites[name]}.mean_abs"], round_mxint))
    logits = load_quantized(stages.checkpoint.path, CPU)(windows_WT).logits
    torch.testing.assert_close(logits, expected(windows_WT).logits, rtol=1e-3, atol=1e-4)
    assert (logits - stages.model(windows_WT).logits).abs().max() > 1e-2


@torch.no_grad()
def test_nothing_quantized_gives_the_original_bit_for_bit(architecture, random_model, run_stages, plan, windows_WT):
    model = random_model(architecture)
    checkpoint = run_stages(model, plain_plan(plan)).checkpoint
    assert torch.equal(load_quantized(checkpoint.path, CPU)(windows_WT).logits, model(windows_WT).logits)


def test_what_is_not_quantized_is_kept_bit_for_bit(stages):
    loaded = load_quantized(stages.checkpoint.path, CPU)
    weights = {f"{name}.weight" for name in stages.details["linears"]}
    for name, parameter in stages.model.named_parameters():
        if name not in weights:
            owner, _, leaf = name.rpartition(".")
            assert torch.equal(getattr(loaded.get_submodule(owner), leaf), parameter), name
    assert not any(tensor.is_meta for tensor in loaded.buffers())


def test_every_planned_linear_is_a_quantized_one(stages):
    loaded = load_quantized(stages.checkpoint.path, CPU)
    modules = dict(loaded.get_submodule(stages.details["blocks"]["name"]).named_modules())
    assert not any(isinstance(module, nn.Linear) for module in modules.values())
    assert sum(isinstance(module, QuantizedLinear) for module in modules.values()) == len(stages.details["linears"])


def test_tied_embeddings_are_stored_once_and_tied_again(stages):
    outside = load_file(stages.checkpoint.file(OUTSIDE_FILE))
    loaded = load_quantized(stages.checkpoint.path, CPU)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == stages.model.config.tie_word_embeddings
    assert tied == ("lm_head.weight" not in outside)


@torch.no_grad()
def test_saving_a_loaded_model_again_is_refused(stages, tmp_path):
    with pytest.raises(ModelError, match="copy its checkpoint folder"):
        load_quantized(stages.checkpoint.path, CPU).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_it_generates_and_its_tokenizer_is_at_hand(stages, letter_tokenizer):
    loaded = load_quantized(stages.checkpoint.path, CPU)
    tokenizer = AutoTokenizer.from_pretrained(stages.checkpoint.path)
    inputs = tokenizer(["quantized", "lqer"], return_tensors="pt", padding=True, return_token_type_ids=False)
    assert torch.equal(
        inputs["input_ids"], letter_tokenizer(["quantized", "lqer"], padding=True, return_tensors="pt")["input_ids"]
    )
    output = loaded.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert output.shape == (2, 9 + 6)


def test_blocks_hold_packed_codes_and_no_second_copy_of_a_weight(stages):
    for i in range(stages.details["blocks"]["count"]):
        tensors = stages.checkpoint.tensors(block_file(i))
        for name in stages.details["linears"]:
            stored = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            if stored:
                roles = {"weight": (".codes", ".exponents")} | dict.fromkeys(
                    ("low_rank_a", "low_rank_b"), (".codes", ".exponents")
                )
                packed = {f".{role}{part}" for role, parts in roles.items() for part in parts}
                assert stored.keys() - {".bias"} == packed
                assert {stored[key].dtype for key in packed} == {torch.uint8}


def test_a_process_that_loads_it_for_plain_torch_imports_no_kernels(stages):
    code = (
        "import sys; from lqer.checkpoint.load import load_quantized; "
        f"load_quantized({str(stages.checkpoint.path)!r}, 'cpu'); print('lqer.kernels' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


@torch.no_grad()
@pytest.mark.parametrize("architecture_in_bf16", ["llama", "gemma3", "gpt2"])
def test_a_half_precision_model_may_be_run_in_float32(
    architecture_in_bf16, random_model, run_stages, plan, windows_WT, tmp_path
):
    model = random_model(architecture_in_bf16).to(torch.bfloat16)
    if architecture_in_bf16 == "gpt2":
        model = type(model)(model.config).to(torch.bfloat16)
    stored, original = in_stored_dtype(model, tmp_path)
    path = run_stages(stored, plain_plan(plan, "bfloat16")).checkpoint.path
    loaded = load_quantized(path, CPU)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(windows_WT).logits, original(windows_WT).logits)
    assert torch.equal(load_quantized(path, CPU, torch.bfloat16)(windows_WT).logits, stored(windows_WT).logits)


@torch.no_grad()
def test_a_head_that_the_original_holds_apart_stays_apart(random_model, run_stages, plan, windows_WT, tmp_path):
    model = random_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = load_model(resolve_model(str(tmp_path)), torch.float32, CPU)
    loaded = load_quantized(run_stages(stored, plain_plan(plan)).checkpoint.path, CPU)
    assert torch.equal(loaded(windows_WT).logits, stored(windows_WT).logits)


def test_a_skipped_linear_stays_as_it_was(random_model, run_stages, plan):
    model = random_model("opt")
    skipped = "model.decoder.layers.1.fc1"
    stages = run_stages(model, plan, skip=[skipped])
    assert skipped not in stages.details["linears"]
    linear = load_quantized(stages.checkpoint.path, CPU).get_submodule(skipped)
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, model.get_submodule(skipped).weight)
    assert torch.equal(linear.bias, model.get_submodule(skipped).bias)


@torch.no_grad()
def test_biases_activations_and_attention_are_quantized_as_planned(
    random_model, run_stages, plan, round_mxint, windows_WT
):
    model = random_model("opt")
    operand = MXInt(bits=6)
    settings = {"format": operand.to_dict(), "axis": "lqer"}
    plan = replace(plan, bias=MXInt(bits=4), activation=MXInt(bits=5, block_size=8))
    path = run_stages(model, plan, attention=settings).checkpoint.path
    loaded = load_quantized(path, CPU)
    name = "model.decoder.layers.0.self_attn.q_proj"
    assert f"{name}.bias" not in load_file(path / block_file(0))
    layer = loaded.get_submodule(name)
    assert layer.activation == plan.activation
    assert torch.equal(layer.bias.double(), round_mxint(model.get_submodule(name).bias, 4))
    logits = loaded(windows_WT).logits
    (path / DETAILS_FILE).write_text(json.dumps(json.loads((path / DETAILS_FILE).read_text()) | {"attention": None}))
    by_hand = load_quantized(path, CPU, verify=False)
    assert not torch.allclose(by_hand(windows_WT).logits, logits, atol=1e-3)
    quantize_attention(by_hand, QuantizedAttention(operand, "reference"))
    assert torch.equal(by_hand(windows_WT).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("architecture_in_another_basis", ["llama", "opt"])
def test_a_linear_in_another_basis_computes_what_it_did(
    architecture_in_another_basis, random_model, run_stages, plan, windows_WT
):
    model = random_model(architecture_in_another_basis)
    path = run_stages(model, replace(plain_plan(plan), transform=Hadamard())).checkpoint.path
    loaded = load_quantized(path, CPU)
    assert sum(isinstance(module, HadamardLinear) for module in loaded.modules()) > 0
    torch.testing.assert_close(loaded(windows_WT).logits, model(windows_WT).logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("weight", [E8P(2), Trellis(3)])
def test_codes_of_vectors_and_signs_come_back_from_disk_as_they_were(random_model, run_stages, plan, weight):
    """The linears of a checkpoint against the method on the same weights and statistics."""
    plan = replace(plan, method=QeraExact(), weight=weight, rounding=Ldlq(), transform=Hadamard(), bias=MXInt(8))
    stages = run_stages(random_model("opt"), plan)
    name = "model.decoder.layers.1.fc1"
    site = all_sites(stages.calibration)[name]
    hessian_II = stages.calibration.tensors(block_file(1))[f"{site}.hessian"]
    linear = stages.model.get_submodule(name)
    expected = plan.quantize(linear.weight, {"hessian": hessian_II})
    loaded = load_quantized(stages.checkpoint.path, CPU).get_submodule(name)
    x_TI = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    y_TO = x_TI @ expected.effective_weight().T + plan.bias.quantize(linear.bias).dequantize()
    torch.testing.assert_close(loaded(x_TI), y_TO, rtol=1e-4, atol=1e-4)
    signs = stages.checkpoint.tensors(block_file(1))[f"{name}.transform.input_signs"]
    assert (signs.dtype, len(signs)) == (torch.uint8, linear.in_features // 8)


def test_several_chat_templates_are_kept(random_model, run_stages, plan, letter_tokenizer, monkeypatch):
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    monkeypatch.setattr(letter_tokenizer, "chat_template", templates)
    path = run_stages(random_model("llama"), plan).checkpoint.path
    assert AutoTokenizer.from_pretrained(path).chat_template == templates


@pytest.fixture
def damaged(random_model, run_stages, plan, tmp_path) -> Path:
    """A copy of a checkpoint, for tests to break."""
    return Path(shutil.copytree(run_stages(random_model("llama"), plan).checkpoint.path, tmp_path / "copy"))


def test_the_folder_of_a_run_is_as_good_as_its_checkpoint(damaged, tmp_path, windows_WT):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT_LINK).symlink_to(damaged)
    of_run, of_checkpoint = (load_quantized(folder, CPU) for folder in (tmp_path / "run", damaged))
    with torch.no_grad():
        assert torch.equal(of_run(windows_WT).logits, of_checkpoint(windows_WT).logits)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"is not a quantized checkpoint: it has no lqer\.json"):
        load_quantized(tmp_path, CPU)


def test_a_checkpoint_of_another_version_is_refused(damaged):
    details = json.loads((damaged / DETAILS_FILE).read_text())
    (damaged / DETAILS_FILE).write_text(json.dumps(details | {"format_version": 99}))
    with pytest.raises(ModelError, match="format_version 99 is not supported, only 1"):
        load_quantized(damaged, CPU, verify=False)


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        (OUTSIDE_FILE, "model.norm.weight"),
        (OUTSIDE_FILE, "lm_head.weight"),
        (block_file(1), "model.layers.1.input_layernorm.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(damaged, file, missing):
    tensors = load_file(damaged / file)
    del tensors[missing]
    save_file(tensors, damaged / file)
    with pytest.raises(ModelError, match=f"has no values for {missing}"):
        load_quantized(damaged, CPU, verify=False)


def test_an_unknown_backend_is_refused(damaged):
    with pytest.raises(ModelError, match="backend 'cuda' is not one of"):
        load_quantized(damaged, CPU, backend="cuda")


def test_a_state_dict_holds_every_tensor(stages, windows_WT):
    loaded = load_quantized(stages.checkpoint.path, CPU)
    expected = loaded(windows_WT).logits
    stored = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    assert {name for name, _ in loaded.named_parameters()} <= stored.keys()
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    assert not torch.equal(loaded(windows_WT).logits, expected)
    loaded.load_state_dict(stored)
    assert torch.equal(loaded(windows_WT).logits, expected)


@pytest.mark.parametrize("name", ["self_attn.q_proj.scale", "self_attn.q_proj.weight", "extra"])
def test_an_extra_tensor_is_named(damaged, name):
    file = damaged / block_file(1)
    save_file(load_file(file) | {f"model.layers.1.{name}": torch.ones(2)}, file)
    with pytest.raises(ModelError, match=rf"holds a tensor that the model does not use: model\.layers\.1\.{name}"):
        load_quantized(damaged, CPU, verify=False)


def test_an_extra_tensor_outside_the_blocks_is_named(damaged):
    save_file(load_file(damaged / OUTSIDE_FILE) | {"model.extra": torch.ones(2)}, damaged / OUTSIDE_FILE)
    with pytest.raises(ModelError, match=r"holds a tensor that the model does not use: model\.extra"):
        load_quantized(damaged, CPU, verify=False)


def test_a_tensor_of_another_shape_is_named(damaged):
    tensors = load_file(damaged / OUTSIDE_FILE)
    save_file(tensors | {"model.norm.weight": torch.ones(7)}, damaged / OUTSIDE_FILE)
    with pytest.raises(ModelError, match=r"model\.norm\.weight in .* has shape \[7\], not \[32\]"):
        load_quantized(damaged, CPU, verify=False)
