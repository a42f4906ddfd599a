"""A checkpoint whose tensors are not those of its model is refused by name, however it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lqer.errors import ModelError
from lqer.models import source as models_source
from lqer.models.open import load_whole
from lqer.models.source import check_weights, load_model, resolve_model
from lqer.models.streaming import open_model
from lqer.models.verify import refuse_foreign_linears

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def original(random_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def changed(original, tmp_path):
    """`changed(change, **settings)`: a copy with other tensors and entries of config.json."""

    def copy(change: Change = lambda tensors: tensors, **settings) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(original, folder)
        tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def without(*names: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def prefixed(prefix: str) -> Change:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def added(name: str, tensor: Tensor) -> Change:
    return lambda tensors: {**tensors, name: tensor}


def refusals(folder: Path) -> set[str]:
    """What checking, loading whole and opening block by block say; all of them have to refuse."""
    source = resolve_model(str(folder))
    said = set()
    for way in (
        lambda: check_weights(source),
        lambda: load_model(source, torch.float32, CPU),
        lambda: open_model(source, torch.float32, CPU),
    ):
        with pytest.raises(ModelError) as refused:
            way()
        said.add(str(refused.value))
    return said


CASES = {
    "a tensor is missing": (without(DOWN), {}, f"has no tensor {DOWN}: "),
    "config.json has more blocks": (
        lambda tensors: tensors, {"num_hidden_layers": 4}, "has no tensor model.layers.2.input_layernorm.* and 17 more",
    ),
    "config.json has fewer blocks": (
        lambda tensors: tensors, {"num_hidden_layers": 1}, "does not use: model.layers.1.input_layernorm.* and 8 more",
    ),
    "a tensor is cut": (
        lambda tensors: tensors | {DOWN: tensors[DOWN][:, :60]}, {}, f"{DOWN} of .* has shape .32, 60., and",
    ),
    "a tensor is transposed": (
        lambda tensors: tensors | {DOWN: tensors[DOWN].T}, {}, f"{DOWN} of .* has shape .64, 32., and",
    ),
    "an encoder without a head": (without("lm_head.weight"), {"tie_word_embeddings": False}, "has no tensor lm_head"),
    "a reward head": (
        lambda tensors: without("lm_head.weight")(tensors) | {"score.weight": torch.ones(1, 32)},
        {"tie_word_embeddings": False}, "has no tensor lm_head.weight",
    ),
    "distributed training": (prefixed("module."), {}, 'begin with "module.", as of .*: save model.module'),
    "a compiled model": (prefixed("_orig_mod."), {}, 'begin with "_orig_mod.", as of .*: save model._orig_mod'),
    "an adapter": (prefixed("base_model.model."), {}, "as of a PEFT model: save model.merge_and_unload"),
    "scales next to a weight": (
        added(f"{DOWN}_scale_inv", torch.ones(1, 1)), {}, f"has a tensor that its model does not use: {DOWN}_scale_inv",
    ),
    "codes of 8 bits": (
        lambda tensors: tensors | {DOWN: tensors[DOWN].to(torch.float8_e4m3fn)}, {}, f"{DOWN} of .* stored as F8_E4M3",
    ),
    "integers": (lambda tensors: tensors | {DOWN: tensors[DOWN].to(torch.int8)}, {}, f"{DOWN} of .* is stored as I8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tensors_that_are_not_those_of_the_model_are_refused_by_name(case, changed):
    change, settings, message = CASES[case]
    said = refusals(changed(change, **settings))
    assert len(said) == 1
    with pytest.raises(ModelError, match=message):
        raise ModelError(said.pop())


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "unheard-of", None])
def test_a_quantized_source_is_refused_with_what_to_do(method, changed):
    folder = changed(quantization_config={"quant_method": method})
    (said,) = refusals(folder)
    assert f"is quantized already (quant_method {method!r}): use the original model, or save it dequantized" in said


def test_buffers_that_transformers_ignores_are_accepted(changed):
    folder = changed(added("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))
    source = resolve_model(str(folder))
    check_weights(source)
    load_model(source, torch.float32, CPU)
    open_model(source, torch.float32, CPU)


def test_the_base_model_alone_is_accepted_where_the_head_is_tied(random_model, tmp_path):
    model = random_model("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    check_weights(resolve_model(str(tmp_path)))


def test_every_family_is_accepted_as_it_is_saved(architecture, random_model, tmp_path):
    random_model(architecture).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    if architecture == "gpt2":
        pytest.skip("its Conv1D were replaced, which changes what is saved")
    check_weights(source)


def test_fp8_weights_are_dequantized_with_their_scales(changed, original):
    scale = 0.5

    def to_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        codes = {name: (tensor / scale).to(torch.float8_e4m3fn) for name, tensor in tensors.items() if "proj" in name}
        return tensors | codes | {f"{name}_scale_inv": torch.full((1, 1), scale) for name in codes}

    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    folder = changed(to_fp8, quantization_config=settings)
    source = resolve_model(str(folder))
    check_weights(source)
    expected = (load_file(original / WEIGHTS)[DOWN] / scale).to(torch.float8_e4m3fn).float() * scale
    for model in (load_model(source, torch.float32, CPU), load_whole(source, torch.float32, CPU)):
        assert torch.equal(model.get_parameter(DOWN), expected)
        assert type(model.get_submodule(DOWN.removesuffix(".weight"))) is nn.Linear
        assert getattr(model.config, "quantization_config", None) is None


def test_a_linear_with_parameters_of_its_own_is_refused(random_model):
    class ScaledLinear(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.ones(1))

    model = random_model("llama")
    refuse_foreign_linears("tiny", model)
    model.model.layers[0].extra = ScaledLinear()
    with pytest.raises(ModelError, match=r"model\.layers\.0\.extra of tiny is a ScaledLinear, whose weight"):
        refuse_foreign_linears("tiny", model)


def test_files_are_checked_once_until_one_of_them_changes(changed, monkeypatch):
    folder = changed()
    source = resolve_model(str(folder))
    checked = []
    monkeypatch.setattr(models_source, "check_tensors", lambda *arguments: checked.append(arguments))
    check_weights(source)
    check_weights(source)
    assert len(checked) == 1
    save_file(without(DOWN)(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    check_weights(source)
    assert len(checked) == 2
