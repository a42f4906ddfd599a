"""Stage "finetune": what is trained and what is not, what is kept, and how it goes on after a kill.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import copy
import fnmatch
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lqer.checkpoint.bits import average_bits
from lqer.checkpoint.load import load_quantized
from lqer.checkpoint.pack import DETAILS_FILE, split_columns
from lqer.config.schema import FinetuneConfig
from lqer.formats import E8P, Int, MXInt, Passthrough, without_first
from lqer.methods import QeraExact
from lqer.stages.finetune import HISTORY_FILE, TRAINING_FILES, finetune
from lqer.store.names import block_file, layers_file
from lqer.store.store import Artifact, Store, Workspace
from lqer.training.loss import soft_loss
from lqer.transforms import Hadamard

CPU = torch.device("cpu")
FACTOR = E8P(4, block_size="row", scale_dtype="float16")
SIGNS = FinetuneConfig(parts=("rht_signs",), num_samples=6, validation_samples=2, seq_len=12, epochs=3)


@pytest.fixture(scope="module")
def training_WT() -> Tensor:
    return torch.randint(3, 80, (8, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def quantized(random_model, run_stages, plan):
    """A Llama with two-bit weights and four-bit factors in a rotated basis."""
    plan = replace(
        plan, method=QeraExact(), weight=E8P(2), factor=FACTOR, factor_axis="outer", transform=Hadamard(), rank=8
    )
    return run_stages(random_model("llama"), plan)


def tune(store: Store, quantized, windows_WT: Tensor, settings: FinetuneConfig, stop_after: str = "") -> Artifact:
    """The stage; a kill right after the first file of that name is written where `stop_after` is given."""

    def make(workspace: Workspace) -> None:
        write = workspace.write

        def write_then_die(name, content, size=0):
            write(name, content, size)
            if name == stop_after:
                raise KeyboardInterrupt

        workspace.write = write_then_die
        student = load_quantized(quantized.checkpoint.path, CPU)
        finetune(workspace, quantized.checkpoint, student, quantized.model, windows_WT, settings, seed=0)

    return store.obtain("finetune", settings.model_dump(mode="json"), make)


@pytest.fixture(scope="module")
def tuned(quantized, training_WT, tmp_path_factory) -> Artifact:
    return tune(Store(tmp_path_factory.mktemp("tuned")), quantized, training_WT, SIGNS)


def validation_loss(path, model, windows_WT: Tensor) -> float:
    with torch.no_grad():
        return float(soft_loss(load_quantized(path, CPU)(windows_WT).logits, model(windows_WT).logits))


def test_the_held_out_loss_falls_and_is_that_of_what_is_stored(quantized, tuned, training_WT):
    history = tuned.json(HISTORY_FILE)
    losses = history["validation_loss"]
    assert len(losses) == 4
    assert losses[history["best_epoch"]] == min(losses) < losses[0]
    before, after = (validation_loss(c.path, quantized.model, training_WT[6:]) for c in (quantized.checkpoint, tuned))
    assert (before, after) == (pytest.approx(losses[0], rel=1e-5), pytest.approx(min(losses), rel=1e-4))


def test_only_the_signs_change_and_their_bits_are_charged(quantized, tuned):
    for index in range(2):
        before, after = (artifact.tensors(block_file(index)) for artifact in (quantized.checkpoint, tuned))
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if ".transform." in name}
        assert {after[name].dtype for name in changed} == {torch.float16}
        for old, new in zip(quantized.checkpoint.json(layers_file(index)), tuned.json(layers_file(index))):
            signs = old["out_features"] + old["in_features"]
            assert new["metadata_bits"] - old["metadata_bits"] == new["sign_bits"] - old["sign_bits"] == 15 * signs
    rows = [row for index in range(2) for row in tuned.json(layers_file(index))]
    assert tuned.json("lqer.json")["bits"] == average_bits(rows)


@pytest.mark.parametrize("columns", [3, 8])
def test_first_columns_are_trained_beside_the_rounded_ones(quantized, training_WT, tmp_path, columns):
    settings = SIGNS.model_copy(update={"parts": ("low_rank",), "columns": columns, "low_rank_learning_rate": 3e-3})
    tuned = tune(Store(tmp_path), quantized, training_WT, settings)
    history = tuned.json(HISTORY_FILE)
    assert history["best_epoch"] > 0
    name = "model.layers.1.mlp.down_proj"
    old, new = (load_quantized(artifact.path, CPU).get_submodule(name) for artifact in (quantized.checkpoint, tuned))
    for role, dim in (("low_rank_a", 1), ("low_rank_b", 0)):
        first_old, rest_old = getattr(old.inner, role).split([columns, 8 - columns], dim)
        first_new, rest_new = getattr(new.inner, role).split([columns, 8 - columns], dim)
        assert torch.equal(rest_old, rest_new)
        assert not torch.equal(first_old, first_new)
        assert torch.equal(first_new, first_new.bfloat16().float())
    assert torch.equal(old.inner.weight, new.inner.weight)
    assert torch.equal(old.input_signs, new.input_signs)
    entry = tuned.json("lqer.json")["linears"][name]
    assert ("low_rank_a" in entry) == (columns < 8)
    row = next(row for row in tuned.json(layers_file(1)) if row["name"] == name)
    stored = tuned.tensors(block_file(1))
    factors = [tensor for key, tensor in stored.items() if key.startswith((f"{name}.first", f"{name}.low_rank"))]
    assert row["low_rank_bits"] == sum(8 * tensor.numel() * tensor.element_size() for tensor in factors)
    loss = validation_loss(tuned.path, quantized.model, training_WT[6:])
    assert loss == pytest.approx(min(history["validation_loss"]), rel=1e-4)


def test_factors_that_are_trained_whole_are_not_cut():
    """A scale that all of them share would forbid it."""
    stored = Int(bits=8, block_size="row").quantize(torch.randn(16, 4), axis=1)
    tensors = {f"up.low_rank_a.{part}": tensor for part, tensor in stored.pack().items()}
    entry = {"low_rank_a": {"format": stored.format.to_dict(), "shape": [16, 4], "axis": 1}}
    more = split_columns(tensors, "up", entry, {"low_rank_a": torch.ones(16, 4, dtype=torch.bfloat16)})
    assert entry.keys() == {"first_a"}
    assert [*tensors] == ["up.first_a.codes"]
    assert more == 16 * 16 * 4 - stored.code_bits - stored.metadata_bits


def test_the_text_itself_may_be_the_target(quantized, training_WT, tmp_path):
    """On one window, held out too, so that there is something to learn."""
    settings = SIGNS.model_copy(update={"loss": "text", "num_samples": 2, "validation_samples": 2, "epochs": 2})
    windows_WT = training_WT[:1].repeat(4, 1)
    losses = tune(Store(tmp_path), quantized, windows_WT, settings).json(HISTORY_FILE)["validation_loss"]
    with torch.no_grad():
        logits = load_quantized(quantized.checkpoint.path, CPU)(windows_WT).logits
    before = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows_WT[:, 1:].flatten())
    assert losses[0] == pytest.approx(float(before), rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stop_after", ["training-00001.safetensors", layers_file(0), block_file(0), DETAILS_FILE])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(quantized, tuned, training_WT, tmp_path, stop_after):
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tune(store, quantized, training_WT, SIGNS, stop_after)
    assert tune(store, quantized, training_WT, SIGNS).manifest["files"] == tuned.manifest["files"]
    assert not fnmatch.filter(tuned.manifest["files"], TRAINING_FILES), "what only resuming needs is not kept"


def test_what_gets_worse_is_not_kept(quantized, training_WT, tmp_path):
    settings = SIGNS.model_copy(update={"learning_rate": 10.0, "epochs": 1})
    tuned = tune(Store(tmp_path), quantized, training_WT, settings)
    history = tuned.json(HISTORY_FILE)
    assert history["validation_loss"][1] > history["validation_loss"][0]
    assert history["best_epoch"] == 0
    assert tuned.tensors(block_file(1)).keys() == quantized.checkpoint.tensors(block_file(1)).keys()
    for name, tensor in quantized.checkpoint.tensors(block_file(1)).items():
        assert torch.equal(tuned.tensors(block_file(1))[name], tensor)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("number_format", [E8P(2), FACTOR, MXInt(4, block_size=16)])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_values_after_a_cut_are_those_that_were_there(number_format, dim, axis):
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    quantized = number_format.quantize(x, axis=axis)
    if dim == axis and isinstance(number_format.block_size, str):
        with pytest.raises(ValueError, match="a scale is shared by all of them"):
            without_first(quantized, dim, 16)
        return
    cut = without_first(copy.copy(quantized), dim, 16)
    expected = quantized.dequantize()[16:] if dim == 0 else quantized.dequantize()[:, 16:]
    assert torch.equal(cut.dequantize(), expected)
    again = number_format.unpack(cut.pack(), cut.shape, cut.axis)
    assert torch.equal(again.dequantize(), expected)


@pytest.fixture(scope="module")
def integers(random_model, run_stages, plan):
    """Two-bit integers with float16 scales, A and B in float16."""
    plan = replace(plan, method=QeraExact(), weight=Int(2, block_size=16), factor=Passthrough("float16"), rank=4)
    return run_stages(random_model("llama"), plan)


@pytest.mark.parametrize(
    ("parts", "changed"),
    [
        (("norms",), {"input_layernorm", "post_attention_layernorm"}),
        (("scales",), {"scales"}),
        (("floats",), {"input_layernorm", "post_attention_layernorm", "scales", "low_rank_a", "low_rank_b"}),
    ],
)
def test_what_is_stored_in_floating_point_is_trained_at_no_cost_in_bits(
    integers, training_WT, tmp_path, parts, changed
):
    tuned = tune(Store(tmp_path), integers, training_WT, SIGNS.model_copy(update={"parts": parts}))
    history = tuned.json(HISTORY_FILE)
    losses = history["validation_loss"]
    assert history["original_loss"] < min(losses) < losses[0]
    assert validation_loss(tuned.path, integers.model, training_WT[6:]) == pytest.approx(min(losses), rel=1e-5)
    before, after = (artifact.tensors(block_file(1)) for artifact in (integers.checkpoint, tuned))
    assert {name: (one.shape, one.dtype) for name, one in before.items()} == {
        name: (one.shape, one.dtype) for name, one in after.items()
    }
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert {next(part for part in name.split(".")[::-1] if part not in ("weight", "codes")) for name in differing} == (
        changed
    )
    assert tuned.json("lqer.json") == integers.checkpoint.json("lqer.json")
    final = [artifact.tensors("outside.safetensors")["model.norm.weight"] for artifact in (integers.checkpoint, tuned)]
    assert torch.equal(*final) == ("norms" not in parts and "floats" not in parts)


def test_a_model_with_rounded_activations_and_attention_can_be_trained(
    random_model, run_stages, plan, training_WT, tmp_path
):
    operand = MXInt(4)
    plan = replace(plan, weight=Int(4, block_size=16), activation=operand)
    rounded = run_stages(random_model("llama"), plan, attention={"format": operand.to_dict(), "axis": "reduction"})
    tuned = tune(Store(tmp_path), rounded, training_WT, SIGNS.model_copy(update={"parts": ("floats",)}))
    losses = tuned.json(HISTORY_FILE)["validation_loss"]
    assert min(losses) < losses[0]
    assert validation_loss(tuned.path, rounded.model, training_WT[6:]) == pytest.approx(min(losses), rel=1e-5)


def test_the_loss_of_the_original_is_measured_on_the_same_windows(quantized, tuned, training_WT):
    with torch.no_grad():
        logits = quantized.model(training_WT[6:]).logits
    assert tuned.json(HISTORY_FILE)["original_loss"] == pytest.approx(float(soft_loss(logits, logits)), rel=1e-5)
