"""Block reconstruction with error propagation: the stored block runs, a killed run resumes."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from helpers import quantize_in_memory, settings_for
from killing import KilledError, dying_workspace

from lqer.checkpoint.load import load_quantized
from lqer.errors import ModelError
from lqer.formats import Int, MXInt
from lqer.methods import QeraExact, RoundingOnly
from lqer.models.structure import find_blocks
from lqer.rounding import Adaptive, Nearest
from lqer.rounding.adaptive import block_loss
from lqer.stages import reconstruct_block
from lqer.store.names import block_file, layers_file, tuning_file
from lqer.store.store import Workspace
from lqer.transforms import Awq, BlockTransform, Clip, Lwc

CPU = torch.device("cpu")
W2 = Int(bits=2, block_size=16)
AWQ_CLIP = (Awq(), Clip())
LWC = Lwc(epochs=3, batch_size=2)
QUICK = Adaptive(steps=4, batch_size=2, learning_rate=3e-2, scale_learning_rate=1e-2, soft_fractions=(0.6, 0.3, 0.05))


@pytest.fixture(scope="module")
def adaptive_plan(plan):
    return replace(plan, method=RoundingOnly(), rank=0, weight=W2, rounding=QUICK)


@torch.no_grad()
def block_outputs(model, windows_WT):
    outputs = []
    hooks = [
        block.register_forward_hook(lambda _, args, output: outputs.append(output)) for block in find_blocks(model)[1]
    ]
    model(windows_WT)
    for hook in hooks:
        hook.remove()
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_last_loss_of_a_block_is_that_of_the_checkpoint_as_it_runs(
    random_model, letter_tokenizer, text, adaptive_plan, tmp_path, family
):
    """What is evaluated is what was trained: loaded from its files, the block is as far from the original as noted."""
    model = random_model(family)
    found = quantize_in_memory(
        tmp_path, model, letter_tokenizer, text, settings_for(model, adaptive_plan, transforms=AWQ_CLIP)
    )
    outputs = block_outputs(load_quantized(tmp_path, CPU, verify=False), text.windows_WT)
    targets = block_outputs(model, text.windows_WT)
    for index, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        notes = found.json(tuning_file(index))
        loss, changed = notes["loss"], notes["changed_codes"]
        assert len(changed) == len(settings_for(model, adaptive_plan).plans) // 2
        assert all(0 <= share < 1 for share in changed.values())
        assert float(block_loss(output, target)) == pytest.approx(loss["end"], rel=1e-3)
        assert loss["end"] < loss["start"]
        assert len(loss["rounds"]) == 3


@pytest.mark.parametrize("number_format", [W2, MXInt(bits=3)], ids=["int", "mxint"])
def test_a_low_rank_branch_reconstructs_what_rounding_left(
    random_model, letter_tokenizer, text, adaptive_plan, tmp_path, number_format
):
    plan = replace(adaptive_plan, weight=number_format)
    branch = replace(plan, method=QeraExact(), rank=4)
    model = random_model("llama", num_hidden_layers=1)
    alone = quantize_in_memory(
        tmp_path / "alone", model, letter_tokenizer, text, settings_for(model, plan, transforms=AWQ_CLIP)
    )
    found = quantize_in_memory(
        tmp_path / "branch", model, letter_tokenizer, text, settings_for(model, branch, transforms=AWQ_CLIP)
    )
    for row, other in zip(found.json(layers_file(0)), alone.json(layers_file(0)), strict=True):
        assert row["output_error_before"] == other["output_error"]
        assert row["output_error"] < other["output_error"]
        assert row["rank"] == 4
    codes = [
        workspace.tensors(block_file(0))["model.layers.0.mlp.up_proj.weight.codes"] for workspace in (alone, found)
    ]
    assert torch.equal(*codes)


def test_activations_attention_and_skipped_linears_take_part(
    random_model, letter_tokenizer, text, adaptive_plan, tmp_path
):
    plan = replace(adaptive_plan, weight=Int(bits=4, block_size="row"), activation=Int(bits=4, block_size="row"))
    attention = {"format": MXInt(bits=8).to_dict(), "axis": "reduction"}
    model = random_model("qwen3", num_hidden_layers=2)
    settings = settings_for(model, plan, attention, ("down_proj",), AWQ_CLIP)
    found = quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings)
    names = [row["name"] for row in found.json(layers_file(1))]
    assert len(names) == 6
    assert not any(name.endswith("down_proj") for name in names)
    for index in range(2):
        loss = found.json(tuning_file(index))["loss"]
        assert loss["end"] < loss["start"]
    # The neighbour of a skipped linear's site stays as it was.
    stored = found.tensors(block_file(0))["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(stored, model.model.layers[0].mlp.down_proj.weight)


def test_a_block_that_is_skipped_whole_is_left_as_it_was(random_model, letter_tokenizer, text, adaptive_plan, tmp_path):
    model = random_model("llama", num_hidden_layers=2)
    settings = settings_for(model, adaptive_plan, transforms=AWQ_CLIP)
    plans = {name: None if ".layers.0." in name else plan for name, plan in settings.plans.items()}
    found = quantize_in_memory(tmp_path, model, letter_tokenizer, text, replace(settings, plans=plans))
    assert [tuning_file(index) in found for index in range(2)] == [False, True]
    stored = found.tensors(block_file(0))
    for name, tensor in model.model.layers[0].state_dict().items():
        assert torch.equal(stored[f"model.layers.0.{name}"], tensor)


PARTS = {
    "awq, clip, adaptive": (AWQ_CLIP, QUICK),
    "awq, lwc, adaptive": ((Awq(), LWC), QUICK),
    "lwc": ((LWC,), Nearest()),
}


@pytest.fixture(scope="module")
def whole_run(random_model, letter_tokenizer, text, adaptive_plan, tmp_path_factory):
    """By the name of its parts: model, settings, and the workspace of a run that nothing interrupted."""
    model = random_model("llama", num_hidden_layers=2)

    @functools.cache
    def of(parts: str):
        transforms, rounding = PARTS[parts]
        settings = settings_for(model, replace(adaptive_plan, rounding=rounding), transforms=transforms)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reconstruct_block, "SECONDS_BETWEEN_STATES", 0.0)
            folder = tmp_path_factory.mktemp("whole")
            return model, settings, quantize_in_memory(folder, model, letter_tokenizer, text, settings)

    return of


@pytest.mark.parametrize(
    ("parts", "killed"),
    [
        *(("awq, clip, adaptive", {"at_write": index}) for index in (0, 1, 3, 4, 5, 7, 9)),
        *(("awq, clip, adaptive", {"at_removal": index}) for index in (0, 4)),
        *(("awq, lwc, adaptive", {"at_write": index}) for index in (3, 6, 12)),
        ("awq, lwc, adaptive", {"at_removal": 5}),
        ("lwc", {"at_write": 2}),
        ("lwc", {"at_write": 7}),
    ],
)
def test_a_run_killed_anywhere_resumes_to_the_same_bytes(
    letter_tokenizer, text, tmp_path, monkeypatch, whole_run, parts, killed
):
    monkeypatch.setattr(reconstruct_block, "SECONDS_BETWEEN_STATES", 0.0)
    model, settings, whole = whole_run(parts)
    with pytest.raises(KilledError):
        quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings, dying_workspace(**killed))
    quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings)
    names = whole.names()
    assert not [name for name in names if name.startswith("state-")]
    assert Workspace(tmp_path).names() == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("writes", "saved", "transforms", "steps"),
    [(1, "01-0000", 1, 0), (3, "01-0002", 1, 2), (5, "02-0000", 2, 0), (7, "02-0002", 2, 2)],
)
def test_a_killed_block_resumes_after_its_last_epoch_or_round(
    random_model, letter_tokenizer, text, adaptive_plan, tmp_path, monkeypatch, caplog, writes, saved, transforms, steps
):
    monkeypatch.setattr(reconstruct_block, "SECONDS_BETWEEN_STATES", 0.0)
    model = random_model("llama", num_hidden_layers=1)
    settings = settings_for(model, adaptive_plan, transforms=(Awq(), LWC))
    with pytest.raises(KilledError):
        quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings, dying_workspace(at_write=writes))
    assert Workspace(tmp_path).names() == [f"state-00000-{saved}.safetensors"]
    with caplog.at_level("INFO"):
        quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings)
    done = f"transforms done: {transforms}/2, epochs or rounds of the next part done: {steps}"
    assert f"model.layers.0: resuming ({done})" in caplog.messages


@dataclass(frozen=True)
class CountingLwc(Lwc):
    """Lwc that records each application."""

    applied: list[str] = field(default_factory=list)

    def apply(self, problem, result, progress, save_state):
        self.applied.append("lwc")
        return super().apply(problem, result, progress, save_state)


def test_a_finished_transform_is_not_repeated(letter_tokenizer, text, tmp_path, monkeypatch, whole_run):
    """Learning again may end elsewhere, as on a GPU: rounding resumes under the very scales it began with."""
    monkeypatch.setattr(reconstruct_block, "SECONDS_BETWEEN_STATES", 0.0)
    model, settings, whole = whole_run("awq, lwc, adaptive")
    with pytest.raises(KilledError):
        quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings, dying_workspace(at_write=6))
    counting = CountingLwc(LWC.epochs, LWC.batch_size)
    quantize_in_memory(tmp_path, model, letter_tokenizer, text, replace(settings, transforms=(Awq(), counting)))
    assert len(counting.applied) == 1, "to the second block alone"
    assert (tmp_path / block_file(0)).read_bytes() == (whole.path / block_file(0)).read_bytes()


@dataclass(frozen=True)
class RoundWider(BlockTransform):
    """Rounds every linear to nearest with a bit more than planned."""

    def apply(self, problem, result, progress, save_state):
        rounded = {
            linear: replace(number_format, bits=number_format.bits + 1).quantize(result.weight(problem, linear))
            for linear, number_format in problem.formats.items()
        }
        return replace(result, rounded=rounded)


@pytest.mark.parametrize("rounding", [Nearest(), QUICK], ids=["nearest", "adaptive"])
def test_a_killed_run_keeps_the_format_that_a_transform_rounded_in(
    random_model, letter_tokenizer, text, adaptive_plan, tmp_path, monkeypatch, rounding
):
    monkeypatch.setattr(reconstruct_block, "SECONDS_BETWEEN_STATES", 0.0)
    model = random_model("llama", num_hidden_layers=1)
    settings = settings_for(model, replace(adaptive_plan, rounding=rounding), transforms=(RoundWider(),))
    whole = quantize_in_memory(tmp_path / "whole", model, letter_tokenizer, text, settings)
    assert {row["entry"]["weight"]["format"]["bits"] for row in whole.json(layers_file(0))} == {W2.bits + 1}
    with pytest.raises(KilledError):
        quantize_in_memory(tmp_path / "killed", model, letter_tokenizer, text, settings, dying_workspace(at_write=1))
    assert Workspace(tmp_path / "killed").names() == ["state-00000-01-0000.safetensors"]
    resumed = quantize_in_memory(tmp_path / "killed", model, letter_tokenizer, text, settings)
    for name in whole.names():
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes(), name


@dataclass(frozen=True)
class PoisonTargets(BlockTransform):
    """Changes nothing; the targets become NaN in a later forward pass of the block."""

    at_pass: int

    def apply(self, problem, result, progress, save_state):
        passes = itertools.count()

        def poison(*_):
            if next(passes) == self.at_pass:
                problem.targets_STD.fill_(torch.nan)

        problem.call.block.register_forward_hook(poison)
        return result


def test_a_block_that_diverges_is_named_and_its_last_sound_state_saved(
    random_model, letter_tokenizer, text, adaptive_plan, tmp_path
):
    # The loss at the start takes three passes (five windows by twos), a round four.
    transforms = (*AWQ_CLIP, PoisonTargets(at_pass=3 + 4))
    model = random_model("llama")
    with pytest.raises(ModelError, match=r"model\.layers\.0: round 2 of 3 diverged: its loss is nan; the state before"):
        quantize_in_memory(
            tmp_path, model, letter_tokenizer, text, settings_for(model, adaptive_plan, transforms=transforms)
        )
    saved = Workspace(tmp_path).tensors("state-00000-03-0001.safetensors")
    assert len(saved["part_state.losses"]) == 1
    assert not any(tensor.isnan().any() for name, tensor in saved.items() if name.startswith("part_state."))


def test_without_block_transforms_no_block_is_reconstructed(random_model, letter_tokenizer, text, plan, tmp_path):
    model = random_model("llama")
    found = quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings_for(model, plan))
    assert tuning_file(0) not in found
