"""Checkpoints of mixtures of experts in the targets that have a form for them; the others refuse in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mixtures import random_mixture
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lqer.checkpoint.load import load_quantized
from lqer.errors import ExportError
from lqer.export import Awq, CompressedTensors, Dense, Gguf, Gptq, Mlx, Native, Peft, export
from lqer.export.base import Target
from lqer.formats import Int, MXInt
from lqer.models.structure import block_linears, prepare_model

WEIGHT = MXInt(bits=4, block_size=16)
EIGHT_BITS = MXInt(bits=8, block_size=16)
INT = Int(bits=4, block_size=32, symmetric=True)
# Named one by one in files: as they are here, and in Mixtral's way. Stacked there, too.
SINGLE, STACKED = ["qwen3_moe", "deepseek_v3", "mixtral", "minimax_m2"], ["gpt_oss", "granitemoe"]


@pytest.fixture
def mixture(run_stages, rounded) -> Callable[..., Path]:
    """`mixture(kind, weight)`: a checkpoint; others: the format of what is no expert, skip: names within a block."""

    def make(kind: str, weight: object = WEIGHT, others: object = None, skip: str | None = None, **sizes: int) -> Path:
        model = random_mixture(kind, **sizes)
        prepare_model(model)
        linears = {
            f"model.layers.{index}.{name}" for index in range(2) for name in block_linears(model.model.layers[index])
        }
        beside = {name for name in linears if others is not None and ".experts." not in name}
        skipped = {name for name in linears if skip is not None and skip in name}
        plans = dict.fromkeys(beside, rounded(others))
        return run_stages(model, rounded(weight), skip=skipped, other_plans=plans).checkpoint.path

    return make


class TestCompressedTensors:
    @pytest.mark.parametrize("kind", SINGLE)
    def test_holds_experts_under_the_names_of_the_original(self, mixture, tmp_path, kind):
        """Verified by transformers, which decodes them, to the last bit."""
        checkpoint, out = mixture(kind), tmp_path / "out"
        check = export(checkpoint, CompressedTensors(), out)
        assert check is not None
        assert check.logit_difference == 0.0
        random_mixture(kind).save_pretrained(tmp_path / "original")
        names = {name for name in load_file(tmp_path / "original" / "model.safetensors") if "experts" in name}
        found = load_file(out / "model.safetensors")
        single = {name for name in names if name.replace("shared_experts", "").count("experts.") == 1}
        assert len(single) >= 2 * 4 * 3 / 2
        assert {f"{name}_packed" for name in single} <= found.keys()
        # Which is no linear of transformers', but one of vLLM's.
        ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
        router = "mlp.gate" if kind in ("qwen3_moe", "deepseek_v3") else "block_sparse_moe.gate"
        assert f"model.layers.1.{router}" in ignored

    def test_holds_experts_of_another_width_than_the_rest(self, mixture, tmp_path):
        check = export(mixture("mixtral", others=EIGHT_BITS), CompressedTensors(), tmp_path / "out")
        assert check is not None
        assert check.logit_difference == 0.0
        groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
        assert [
            group["weights"]["num_bits"]
            for group in groups.values()
            if any("experts" in one for one in group["targets"])
        ] == [4]

    @pytest.mark.parametrize("kind", STACKED)
    def test_refuses_what_the_original_stacks(self, mixture, tmp_path, kind):
        with pytest.raises(ExportError, match=r"experts\.0\.\w+: its architecture has no names for single experts"):
            export(mixture(kind), CompressedTensors(), tmp_path / "out")

    @pytest.mark.parametrize(
        ("weight", "reason"),
        [
            (MXInt(bits=3, block_size=16), "experts of 3 bits do not run in vLLM, only those of 4 or 8"),
            (Int(bits=4, block_size=16), "packed integers without zero points"),
        ],
    )
    def test_refuses_what_readers_do_not_run(self, mixture, tmp_path, weight, reason):
        with pytest.raises(ExportError, match=rf"experts\.0\.\w+: .*{reason}.*; targets that can: .*dense"):
            export(mixture("mixtral", weight), CompressedTensors(), tmp_path / "out")

    def test_refuses_experts_that_were_skipped(self, mixture, tmp_path):
        with pytest.raises(
            ExportError, match=r"layers\.0\.mlp\.experts\.1\.gate_proj: it is not quantized, and readers"
        ):
            export(mixture("mixtral", skip=".experts.1."), CompressedTensors(), tmp_path / "out")


class TestNative:
    @pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
    def test_holds_and_saves_experts_byte_for_byte(self, mixture, tmp_path, kind):
        check = export(mixture(kind), Native(), tmp_path / "out")
        assert check is not None
        assert check.logit_difference == 0.0
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        loaded.save_pretrained(tmp_path / "again")
        saved = load_file(tmp_path / "again" / "model.safetensors")
        stored = {
            name: tensor
            for file in (tmp_path / "out").glob("*.safetensors")
            for name, tensor in load_file(file).items()
            if ".experts." in name
        }
        assert len(stored) > 2 * 4
        assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("target", [Awq(), Gguf(), Gguf(dtype="float32"), Gptq(), Mlx(), Peft()], ids=str)
def test_other_targets_name_those_that_can(mixture, tmp_path, target: Target):
    reason = (
        r"experts\.0\.\w+: it is a linear of an expert, which this target does not write; targets that can: .*native"
    )
    with pytest.raises(ExportError, match=rf"^{target.kind} cannot hold model\.layers\.0\.mlp\.{reason}"):
        export(mixture("mixtral", INT, intermediate_size=64), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe", "llama4_text", "longcat_flash"])
def test_dense_experts_are_stacked_as_transformers_holds_them(run_stages, rounded, tmp_path, kind):
    model = random_mixture(kind)
    prepare_model(model)
    skipped = {f"model.layers.1.{name}" for name in block_linears(model.model.layers[1]) if ".experts.1." in name}
    assert skipped
    folder = run_stages(model, rounded(WEIGHT), skip=skipped).checkpoint.path
    export(folder, Dense(), tmp_path / "out", check=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = load_quantized(folder, "cpu", dtype=torch.float32)
    tokens_BT = torch.arange(24).view(2, 12) % 80
    with torch.no_grad():
        assert torch.allclose(found(tokens_BT).logits, expected(tokens_BT).logits, atol=1e-4, rtol=1e-4)
