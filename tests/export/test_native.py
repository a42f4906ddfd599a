"""The native form: loaded by transformers it computes what the checkpoint does, and without lqer it does not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lqer.checkpoint.load import load_quantized
from lqer.checkpoint.native import GUARD_FILE
from lqer.checkpoint.pack import replace_signs, split_columns
from lqer.errors import ModelError
from lqer.export import Native, export
from lqer.formats import E8P, MX, Codebook, Int, MXInt, NormalFloat, Trellis
from lqer.methods import LqerAct
from lqer.models.structure import ONLINE_ROTATIONS
from lqer.store.files import hash_file, write_json
from lqer.store.records import MANIFEST
from lqer.transforms import Hadamard

CPU = torch.device("cpu")
MXINT8 = MXInt(bits=8)
FIRST = "model.layers.0.self_attn.q_proj"


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "weight",
    [
        MXInt(bits=4), MXInt(bits=3, block_size=32, levels="mid-rise"), Int(bits=4, block_size=32, symmetric=True),
        Int(bits=3, block_size=32), Int(bits=4, block_size="row"), MX("mxfp4_e2m1"), NormalFloat(bits=4),
        Codebook(bits=2), E8P(bits=2), Trellis(bits=2),
    ],
    ids=str,
)  # fmt: skip
def test_every_number_format_loads_and_computes_the_same(checkpoint_of, weight, tmp_path):
    check = export(checkpoint_of(weight), Native(), tmp_path / "out")
    assert check.logit_difference == 0
    assert check.exported_perplexity == check.whole_perplexity


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt-neox", "gemma3", "phi3"])
def test_every_architecture_loads(checkpoint_of, architecture, tmp_path):
    assert export(checkpoint_of(MXInt(bits=4), architecture), Native(), tmp_path / "out").logit_difference == 0


class TestBesideTheCodes:
    @pytest.mark.parametrize(
        "changes",
        [
            {"method": LqerAct(), "rank": 4},
            {"activation": MXINT8},
            {"method": LqerAct(), "rank": 4, "activation": MXINT8},
            {"transform": Hadamard()},
            {"transform": Hadamard(), "method": LqerAct(), "rank": 4, "activation": MXINT8},
        ],
        ids=["factors", "inputs", "factors and inputs", "hadamard", "hadamard with factors and inputs"],
    )
    def test_factors_rounded_inputs_and_rotations_are_kept(self, checkpoint_of, changes, tmp_path):
        check = export(checkpoint_of(MXInt(bits=3), **changes), Native(), tmp_path / "out")
        assert check.logit_difference == 0
        assert check.perplexity == check.whole_perplexity
        assert "- Everything that the checkpoint computes." in (tmp_path / "out" / "README.md").read_text()

    def test_rounded_biases_are_carried(self, checkpoint_of, tmp_path):
        check = export(checkpoint_of(MXInt(bits=4), "opt", bias=MXInt(bits=4)), Native(), tmp_path / "out")
        assert check.logit_difference == 0

    @torch.no_grad()
    def test_inputs_are_rotated_at_run_time(self, checkpoint_of, edited, windows_WT, tmp_path):
        rotated = {"model.layers.1.mlp.down_proj": None, "model.layers.0.self_attn.o_proj": 4}
        checkpoint = checkpoint_of(MXInt(bits=4))
        turned = edited(checkpoint, "config.json", lambda config: config.update({ONLINE_ROTATIONS: rotated}))
        assert export(turned, Native(), tmp_path / "out").logit_difference == 0
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(windows_WT).logits
        assert (logits - load_quantized(checkpoint, CPU)(windows_WT).logits).abs().max() > 1e-2

    @torch.no_grad()
    def test_operands_of_attention_are_rounded(self, checkpoint_of, edited, windows_WT, tmp_path):
        rounds = {"format": MXInt(bits=3).to_dict(), "axis": "reduction"}
        checkpoint = checkpoint_of(MXInt(bits=4))
        rounded = edited(checkpoint, "lqer.json", lambda details: details.update(attention=rounds))
        assert export(rounded, Native(), tmp_path / "out").logit_difference == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        logits = model(windows_WT).logits
        assert (logits - load_quantized(checkpoint, CPU)(windows_WT).logits).abs().max() > 1e-2
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(windows_WT).logits, logits)

    def test_trained_signs_and_factors_are_carried(self, checkpoint_of, edited, tmp_path):
        checkpoint = checkpoint_of(MXInt(bits=3), transform=Hadamard(), method=LqerAct(), rank=4)
        assert export(trained(checkpoint, edited), Native(), tmp_path / "out").logit_difference == 0

    def test_a_linear_that_is_not_quantized_stays_plain(self, checkpoint_of, tmp_path):
        checkpoint = checkpoint_of(MXInt(bits=4), skip=(FIRST, "model.layers.1.mlp.up_proj"))
        assert export(checkpoint, Native(), tmp_path / "out").logit_difference == 0


def trained(checkpoint: Path, edited) -> Path:
    """The checkpoint as fine-tuning leaves it: one linear with signs that moved and two columns of A apart."""
    details = json.loads((checkpoint / "lqer.json").read_text())
    entry, tensors = details["linears"][FIRST], load_file(checkpoint / "block-00000.safetensors")
    signs = {"input_signs": 1 + 0.1 * torch.randn(32), "output_signs": -1 + 0.1 * torch.randn(32)}
    replace_signs(tensors, FIRST, signs)
    factors = {"low_rank_a": torch.randn(32, 4).bfloat16(), "low_rank_b": torch.randn(4, 32).bfloat16()}
    split_columns(tensors, FIRST, entry, factors)
    copy = edited(checkpoint, "lqer.json", lambda stored: stored["linears"].update({FIRST: entry}))
    save_file(tensors, copy / "block-00000.safetensors")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"]["block-00000.safetensors"] = hash_file(copy / "block-00000.safetensors")
    write_json(copy / MANIFEST, manifest)
    return copy


@pytest.fixture
def native(checkpoint_of, tmp_path) -> Path:
    """The native form of a model with rotated 3-bit weights, factors and rounded inputs."""
    changes = {"transform": Hadamard(), "method": LqerAct(), "rank": 4, "activation": MXINT8}
    checkpoint = checkpoint_of(MXInt(bits=3), skip=("model.layers.1.mlp.up_proj",), **changes)
    export(checkpoint, Native(), tmp_path / "native", check=False)
    return tmp_path / "native"


class TestSaving:
    @torch.no_grad()
    def test_save_pretrained_keeps_the_packed_bytes_also_after_a_call(self, native, windows_WT, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(native)
        logits = model(windows_WT).logits
        model.save_pretrained(tmp_path / "saved")
        assert same_bytes(stored_in(native), stored_in(tmp_path / "saved"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(again(windows_WT).logits, logits)

    @torch.no_grad()
    def test_a_model_can_be_saved_over_the_files_it_was_read_from(self, native, windows_WT, tmp_path):
        saved = tmp_path / "saved"
        AutoModelForCausalLM.from_pretrained(native).save_pretrained(saved)
        model = AutoModelForCausalLM.from_pretrained(saved)
        packed = {name: tensor.clone() for name, tensor in stored_in(native).items()}
        model.save_pretrained(saved)
        assert same_bytes(packed, stored_in(saved))

    def test_in_another_dtype_only_what_is_not_packed_changes(self, native, tmp_path):
        AutoModelForCausalLM.from_pretrained(native, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
        before, after = stored_in(native), stored_in(tmp_path / "saved")
        assert before.keys() == after.keys()
        changed = {name for name in before if before[name].dtype != after[name].dtype}
        assert all(after[name].dtype == torch.bfloat16 for name in changed)
        assert {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"} < changed
        assert same_bytes(*({name: part[name] for name in before.keys() - changed} for part in (before, after)))
        assert any(name.startswith(f"{FIRST}.low_rank_a.") for name in before.keys() - changed)

    def test_push_to_hub_uploads_the_packed_bytes(self, native, monkeypatch):
        uploaded: dict[str, torch.Tensor] = {}

        def upload(model, working_dir, *arguments, **options):
            uploaded.update(stored_in(Path(working_dir)))
            uploaded["config"] = json.loads((Path(working_dir) / "config.json").read_text())

        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl("https://huggingface.co/someone/model"))
        monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard(""))
        monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
        AutoModelForCausalLM.from_pretrained(native).push_to_hub("someone/model")
        config = uploaded.pop("config")
        assert config["quantization_config"]["quant_method"] == "lqer"
        assert same_bytes(stored_in(native), uploaded)

    def test_the_choice_of_a_backend_is_not_saved(self, native, tmp_path):
        config = AutoConfig.from_pretrained(native)
        before = dict(config.quantization_config)
        config.quantization_config["backend"] = "emulate"
        AutoModelForCausalLM.from_pretrained(native, config=config).save_pretrained(tmp_path / "saved")
        assert AutoConfig.from_pretrained(tmp_path / "saved").quantization_config == before


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors under the same names, to the bit."""
    return one.keys() == other.keys() and all(
        (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


class TestLoading:
    @torch.no_grad()
    def test_the_dtype_is_that_of_everything_that_runs(self, native, windows_WT):
        model = AutoModelForCausalLM.from_pretrained(native, dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} <= {torch.bfloat16, torch.float32}
        assert {tensor.dtype for name, tensor in model.named_buffers() if "inv_freq" not in name} == {torch.bfloat16}
        assert model(windows_WT).logits.dtype == torch.bfloat16

    @pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
    @torch.no_grad()
    def test_a_device_map_is_followed(self, native, windows_WT, device_map):
        model = AutoModelForCausalLM.from_pretrained(native, device_map=device_map)
        assert torch.equal(model(windows_WT).logits, AutoModelForCausalLM.from_pretrained(native)(windows_WT).logits)

    @torch.no_grad()
    def test_load_quantized_takes_the_folder_too(self, native, windows_WT):
        model = load_quantized(native, CPU)
        assert torch.equal(model(windows_WT).logits, AutoModelForCausalLM.from_pretrained(native)(windows_WT).logits)
        with pytest.raises(ModelError, match='"triton" cannot run here'):
            load_quantized(native, CPU, backend="triton")

    @pytest.mark.parametrize(
        "device_map", [{"model.layers.0": 0, "model": "cpu", "lm_head": "cpu"}, {"": "disk"}], ids=["cpu", "disk"]
    )
    def test_offloading_is_refused(self, native, device_map):
        with pytest.raises(ModelError, match="cannot be offloaded"):
            AutoModelForCausalLM.from_pretrained(native, device_map=device_map)

    def test_a_file_without_one_of_the_tensors_is_refused(self, native):
        file = native / "block-00001.safetensors"
        tensors = load_file(file)
        kept = {name: tensor for name, tensor in tensors.items() if ".mlp.gate_proj.weight." not in name}
        save_file(kept, file)
        with pytest.raises(ModelError, match=r"has no tensor of model\.layers\.1\.mlp\.gate_proj\.weight"):
            AutoModelForCausalLM.from_pretrained(native)

    def test_another_version_is_refused(self, native):
        config = AutoConfig.from_pretrained(native)
        config.quantization_config["format_version"] = 2
        with pytest.raises(ModelError, match="format_version 2 is not supported"):
            AutoModelForCausalLM.from_pretrained(native, config=config)

    def test_a_checkpoint_that_was_not_exported_says_how(self, checkpoint_of):
        with pytest.raises(ModelError, match="lqer export CHECKPOINT native OUT"):
            AutoModelForCausalLM.from_pretrained(checkpoint_of(MXInt(bits=4)))


class TestWithoutLqer:
    """In a process that does not import lqer."""

    def load(self, folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
        code = (
            f"{before}\nfrom transformers import AutoModelForCausalLM\n"
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r})\nprint('loaded')"
        )
        return subprocess.run(
            [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False, timeout=300
        )

    def test_loading_fails_and_does_not_invent_weights(self, native):
        done = self.load(native)
        assert done.returncode == 1
        assert "RuntimeError" in done.stderr
        assert self.load(native, "import lqer").stdout == "loaded\n"

    def test_it_is_the_guard_that_makes_it_fail(self, native):
        save_file({}, native / GUARD_FILE)
        assert self.load(native).stdout == "loaded\n"

    def test_a_saved_model_is_guarded_too(self, native, tmp_path):
        AutoModelForCausalLM.from_pretrained(native).save_pretrained(tmp_path / "saved")
        assert self.load(tmp_path / "saved").returncode == 1
