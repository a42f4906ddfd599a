"""Stage "rotate": a folder that is read in the original's place, with the original's function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lqer.errors import ModelError
from lqer.models.loaders import Streamed
from lqer.models.open import open_stored
from lqer.models.source import load_model, resolve_model
from lqer.models.streaming import open_model
from lqer.models.summary import summarize_model
from lqer.stages.rotate import Rotate, rotate, rotate_in_place, rotated_source
from lqer.store.store import Store
from lqer.transforms import Quarot

CPU = torch.device("cpu")


@pytest.fixture
def rotated(random_model, tmp_path):
    """`rotated(family, **changes)`: the model, its source and the source of its rotation."""

    def run(family, online=True, **changes):
        model = random_model(family, **changes)
        model.save_pretrained(tmp_path / "model")
        source = resolve_model(str(tmp_path / "model"))
        make = lambda workspace: rotate(workspace, source, CPU, seed=3, online=online)  # noqa: E731
        artifact = Store(tmp_path / "store").obtain("rotate", 0, make)
        return model, source, rotated_source(source, artifact)

    return run


@torch.no_grad()
def logits(model, windows_WT):
    return model(input_ids=windows_WT).logits


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("mistral", False), ("qwen3", True), ("phi3", False)]
)
def test_the_logits_of_the_folder_are_those_of_the_original(rotated, windows_WT, family, tied):
    model, source, basis = rotated(family, tie_word_embeddings=tied)
    loaded = load_model(basis, torch.float32, CPU)
    before, after = logits(model, windows_WT), logits(loaded, windows_WT)
    assert torch.linalg.vector_norm(after - before) <= 1e-4 * torch.linalg.vector_norm(before)
    changed = (loaded.get_input_embeddings().weight - model.get_input_embeddings().weight).norm()
    assert changed > 0.5 * model.get_input_embeddings().weight.norm()
    assert basis.fingerprint != source.fingerprint
    assert summarize_model(basis).linears == summarize_model(source).linears


@pytest.mark.parametrize("width", [72, 48, 64])
def test_without_rotations_at_run_time_the_folder_is_one_that_any_engine_loads(rotated, windows_WT, width):
    # Hidden sizes with the odd parts of 576 and 288, of 1536, and of none.
    heads = {"num_attention_heads": width // 8, "num_key_value_heads": width // 8, "tie_word_embeddings": True}
    model, _, basis = rotated("llama", online=False, hidden_size=width, **heads)
    assert "online_rotations" not in json.loads((Path(basis.path) / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(basis.path, dtype=torch.float32)
    before, after = logits(model, windows_WT), logits(loaded, windows_WT)
    assert torch.linalg.vector_norm(after - before) <= 1e-4 * torch.linalg.vector_norm(before)
    assert all((weight == 1).all() for name, weight in loaded.named_parameters() if name.endswith("norm.weight"))
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_only_a_rotation_without_run_time_part_has_a_key_of_its_own():
    usual = Rotate("model", 0, CPU)
    assert "transform" not in usual.key
    assert Rotate("model", 0, CPU, Quarot(online=False)).key != usual.key


def test_a_model_read_block_by_block_is_rotated_as_it_runs_too(rotated, windows_WT):
    model, _, basis = rotated("llama")
    opened = open_model(basis, torch.float32, CPU)
    assert isinstance(opened.loader, Streamed)
    opened.loader.load_outer()
    opened.loader.materialize(opened.blocks, lambda index: CPU)
    torch.testing.assert_close(logits(opened.model, windows_WT), logits(model, windows_WT), rtol=1e-3, atol=1e-3)


def test_what_will_be_quantized_is_kept_in_float32_and_the_rest_in_the_dtype_of_the_original(random_model, tmp_path):
    original = random_model("llama").to(torch.bfloat16)
    original.save_pretrained(tmp_path / "model")
    source = resolve_model(str(tmp_path / "model"))
    artifact = Store(tmp_path / "store").obtain("rotate", 0, lambda workspace: rotate(workspace, source, CPU, seed=0))
    basis = rotated_source(source, artifact)
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["online_rotations"]["model.layers.0.self_attn.o_proj"] == 4
    assert config["online_rotations"]["model.layers.1.mlp.down_proj"] is None

    exact = original.float()
    rotate_in_place(exact, CPU, seed=0)
    opened = open_stored(basis, CPU)
    assert (opened.model.dtype, opened.model.lm_head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    for index, block in opened.loader.load_each(opened.blocks, range(2), CPU):
        weight = exact.model.layers[index].mlp.up_proj.weight
        assert torch.equal(block.mlp.up_proj.weight, weight)
        assert not torch.equal(weight, weight.bfloat16().float())


def test_a_model_whose_norms_do_not_allow_it_is_refused_with_the_reason(rotated):
    with pytest.raises(ModelError, match=r"quantize\.transforms: quarot: .*has a bias: only RMS norms can be rotated"):
        rotated("opt")
