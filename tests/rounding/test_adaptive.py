"""Progressive adaptive rounding of a small gated block: what it promises, and what it does when something breaks."""

from __future__ import annotations

import pytest
import torch
from helpers import first_block
from safetensors.torch import load, save
from torch.nn import functional as F

from lqer.formats import Int, MXInt
from lqer.models.structure import block_linears
from lqer.rounding.adaptive import (
    Adaptive,
    AdaptiveState,
    DivergedError,
    block_loss,
    round_block,
    start_state,
)
from lqer.rounding.batches import Goal
from lqer.rounding.par_schedule import SOFT_FRACTIONS_10
from lqer.rounding.soft import Grid
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.clip import quantize_clipped

W2 = Int(bits=2, block_size=16)
QUICK = Adaptive(soft_fractions=SOFT_FRACTIONS_10, steps=12, learning_rate=2e-2)


def block(weights, x):
    return x + F.linear(F.silu(F.linear(x, weights["gate"])) * F.linear(x, weights["up"]), weights["down"])


@pytest.fixture(scope="module")
def task():
    """Weights, calibration inputs and held-out inputs of one distribution, correlated as activations are."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}
    weights = {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
    inputs = torch.randn(48, 16, 32, generator=generator) @ torch.randn(32, 32, generator=generator) / 6
    return weights, inputs[:32], inputs[32:]


def starts_of(weights, number_format):
    return {name: number_format.quantize(weight) for name, weight in weights.items()}


def values(rounded):
    return {name: tensor.dequantize() for name, tensor in rounded.items()}


@pytest.mark.parametrize(
    "number_format",
    [W2, Int(bits=3, block_size="row"), Int(bits=3, block_size=16, symmetric=True), MXInt(bits=3), MXInt(bits=2)],
    ids=str,
)
def test_the_blocks_loss_falls_on_calibration_and_on_held_out_inputs(task, number_format):
    weights, inputs, held_out = task
    starts = starts_of(weights, number_format)
    rounded = round_block(weights, starts, Goal(block, inputs, [block(weights, inputs)]), QUICK)
    for x in (inputs, held_out):
        target = block(weights, x)
        assert block_loss(block(values(rounded), x), target) < 0.8 * block_loss(block(values(starts), x), target)


def test_the_soft_block_starts_at_the_original_but_for_the_error_of_clipping(task):
    weights, inputs, _ = task
    grids = {name: Grid.of(weights[name], start) for name, start in starts_of(weights, W2).items()}
    state = start_state(grids, tune_scales=True)
    soft = {name: grid.weight(state.v[name], state.u[name]) for name, grid in grids.items()}
    clipped = {}
    for name, start in starts_of(weights, W2).items():
        steps, zeros = (start.parts[part].float().repeat_interleave(16, dim=1) for part in ("scales", "zeros"))
        clipped[name] = ((weights[name] / steps + zeros).clamp(0, 3) - zeros) * steps
    target = block(weights, inputs)
    clip_error = block_loss(block(clipped, inputs), target)
    torch.testing.assert_close(block_loss(block(soft, inputs), target), clip_error, rtol=1e-3, atol=1e-6)
    assert 0 < clip_error < block_loss(block(values(starts_of(weights, W2)), inputs), target)


def test_every_round_decides_its_share_of_every_linear(task):
    weights, inputs, _ = task
    fractions = []

    def watch(state):
        fractions.append([float(v.isinf().float().mean()) for v in state.v.values()])

    round_block(
        weights, starts_of(weights, W2), Goal(block, inputs, [block(weights, inputs)]), QUICK, after_round=watch
    )
    assert len(fractions) == len(SOFT_FRACTIONS_10)
    for soft_fraction, found in zip(SOFT_FRACTIONS_10, fractions, strict=True):
        assert all(1 - soft_fraction <= fraction < 1 for fraction in found)


def test_codes_are_never_further_than_the_next_one(task):
    weights, inputs, _ = task
    starts = starts_of(weights, W2)
    rounded = round_block(weights, starts, Goal(block, inputs, [block(weights, inputs)]), QUICK)
    moved = set()
    for name, start in starts.items():
        assert torch.equal(rounded[name].parts["zeros"], start.parts["zeros"])
        difference = rounded[name].parts["codes"].int() - start.parts["codes"].int()
        moved |= set(difference.unique().tolist())
    assert moved == {-1, 0, 1}


def test_scales_stay_as_they_are_unless_they_are_tuned(task):
    weights, inputs, _ = task
    starts, targets = starts_of(weights, W2), block(weights, inputs)
    for tuned in (False, True):
        settings = Adaptive(soft_fractions=SOFT_FRACTIONS_10, steps=4, tune_scales=tuned)
        rounded = round_block(weights, starts, Goal(block, inputs, [targets]), settings)
        same = [torch.equal(rounded[name].parts["scales"], starts[name].parts["scales"]) for name in starts]
        assert same == [not tuned] * 3


def test_the_last_loss_is_that_of_what_is_returned_once_all_is_decided(task):
    """With nearly everything decided and no learning, the trained block and the stored one are the same."""
    weights, inputs, _ = task
    targets = block(weights, inputs)
    losses = []
    settings = Adaptive(
        soft_fractions=(1e-9,), steps=1, batch_size=32, micro_batch=32, learning_rate=0.0, scale_learning_rate=0.0
    )
    rounded = round_block(
        weights,
        starts_of(weights, W2),
        Goal(block, inputs, [targets]),
        settings,
        after_round=lambda s: losses.append(s.losses),
    )
    assert float(losses[0]) == pytest.approx(float(block_loss(block(values(rounded), inputs), targets)), rel=1e-5)


def test_the_micro_batch_bounds_what_passes_the_block_and_changes_nothing_else(task):
    weights, inputs, _ = task
    starts, targets = starts_of(weights, W2), block(weights, inputs)
    results, largest = [], []
    for micro_batch in (4, 1, 3):
        sizes = []

        def watch(soft, x, sizes=sizes):
            sizes.append(len(x))
            return block(soft, x)

        settings = Adaptive(soft_fractions=SOFT_FRACTIONS_10[:3], steps=3, batch_size=4, micro_batch=micro_batch)
        states = []
        round_block(weights, starts, Goal(watch, inputs, [targets]), settings, after_round=states.append)
        results.append(states[-1])
        largest.append(max(sizes))
    assert largest == [4, 1, 3]
    for other in results[1:]:
        torch.testing.assert_close(other.losses, results[0].losses)
        soft = results[0].v["down"].isfinite()
        torch.testing.assert_close(other.v["down"][soft], results[0].v["down"][soft], rtol=1e-3, atol=1e-3)


def test_resuming_between_rounds_gives_the_same_bytes(task):
    weights, inputs, _ = task
    arguments = (weights, starts_of(weights, W2), Goal(block, inputs, [block(weights, inputs)]), QUICK)
    files = []
    whole = round_block(*arguments, after_round=lambda state: files.append(save(state.tensors())))
    for rounds in (1, 6, len(SOFT_FRACTIONS_10)):
        state = AdaptiveState.from_tensors(load(files[rounds - 1]))
        assert state.rounds == rounds
        resumed = round_block(*arguments, state=state)
        for name, tensor in whole.items():
            assert all(torch.equal(tensor.parts[part], resumed[name].parts[part]) for part in tensor.parts)


def test_a_loss_that_is_not_finite_stops_with_the_last_sound_state(task):
    weights, inputs, _ = task
    states = []

    def breaking(soft, x):
        return block(soft, x) * (torch.nan if len(states) == 3 else 1)

    with pytest.raises(DivergedError, match=r"round 4 of 10 diverged: its loss is nan") as caught:
        round_block(
            weights,
            starts_of(weights, W2),
            Goal(breaking, inputs, [block(weights, inputs)]),
            QUICK,
            after_round=states.append,
        )
    assert caught.value.state is states[-1]
    assert all(not v.isnan().any() for v in caught.value.state.v.values())


def test_gradients_that_are_not_finite_are_noticed_even_in_the_last_step(task):
    weights, inputs, _ = task

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.nan

    settings = Adaptive(soft_fractions=(0.5,), steps=1)
    with pytest.raises(DivergedError, match="round 1 of 1 diverged") as caught:
        round_block(
            weights,
            starts_of(weights, W2),
            Goal(lambda soft, x: Poison.apply(block(soft, x)), inputs, [block(weights, inputs)]),
            settings,
        )
    assert caught.value.state.rounds == 0


def test_what_does_not_fit_together_is_refused(task):
    weights, inputs, _ = task
    starts = starts_of(weights, W2)
    with pytest.raises(ValueError, match="are not of the same linears"):
        round_block(weights, {"up": starts["up"]}, Goal(block, inputs, [inputs]), QUICK)
    with pytest.raises(ValueError, match="32 sequences of inputs and 3 of targets"):
        round_block(weights, starts, Goal(block, inputs, [inputs[:3]]), QUICK)
    with pytest.raises(ValueError, match="do not fall strictly between 1 and 0"):
        Adaptive(soft_fractions=(0.5, 0.5))
    with pytest.raises(ValueError, match="micro_batch 0 is not an integer of at least 1"):
        Adaptive(micro_batch=0)


def test_autocast_trains_in_bfloat16(task):
    weights, inputs, held_out = task
    starts, dtypes = starts_of(weights, W2), set()

    def watch(soft, x):
        y = F.linear(x, soft["gate"])
        dtypes.add(y.dtype)
        return block(soft, x)

    settings = Adaptive(soft_fractions=SOFT_FRACTIONS_10, steps=12, learning_rate=2e-2)
    goal = Goal(watch, inputs, [block(weights, inputs)], autocast=torch.bfloat16)
    rounded = round_block(weights, starts, goal, settings)
    assert dtypes == {torch.bfloat16}
    target = block(weights, held_out)
    assert block_loss(block(values(rounded), held_out), target) < block_loss(block(values(starts), held_out), target)


@pytest.mark.parametrize("activations", [None, Int(bits=4, block_size="row")], ids=["weight-only", "w2a4"])
def test_a_decoder_block_is_reconstructed_and_left_as_it_was(random_model, windows_WT, activations):
    module, call, hidden = first_block(random_model("llama"), windows_WT)
    hidden = torch.cat([hidden, hidden.flip(1), hidden.roll(3, dims=1)])
    names = block_linears(module)
    if activations is not None:
        call = BlockFunction(module, call.args, call.kwargs, dict.fromkeys(names, activations))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights = {f"{name}.weight": module.get_parameter(f"{name}.weight").detach() for name in names}
    starts = starts_of(weights, W2)
    with torch.no_grad():
        targets = BlockFunction(module, call.args, call.kwargs)({}, hidden)
    settings = Adaptive(soft_fractions=SOFT_FRACTIONS_10, steps=10, batch_size=5, micro_batch=5, learning_rate=2e-2)
    rounded = round_block(weights, starts, Goal(call, hidden, [targets]), settings)
    with torch.no_grad():
        before, after = (block_loss(call(values(r), hidden), targets) for r in (starts, rounded))
    assert after < 0.8 * before
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_weights_beyond_the_codes_are_no_part_of_the_share_that_stays_soft(task):
    weights, inputs, _ = task
    narrow = {}
    for name, weight in weights.items():
        ones_ON = torch.ones(len(weight), weight.shape[1] // 16)
        narrow[name] = quantize_clipped(weight, W2, 0.6 * ones_ON, 0.6 * ones_ON)
    open_weights = {name: int(Grid.of(weights[name], start).is_open_OI.sum()) for name, start in narrow.items()}
    assert all(count < 0.9 * weights[name].numel() for name, count in open_weights.items())
    soft = []
    settings = Adaptive(soft_fractions=(0.6, 0.2), steps=1, learning_rate=0.0)
    round_block(
        weights, narrow, Goal(block, inputs, [block(weights, inputs)]), settings,
        after_round=lambda state: soft.append({name: int((~v.isinf()).sum()) for name, v in state.v.items()}),
    )  # fmt: skip
    for fraction, found in zip((0.6, 0.2), soft, strict=True):
        assert found == {name: int(fraction * count) for name, count in open_weights.items()}


def test_losses_against_two_targets_are_added(task):
    weights, inputs, _ = task
    target = block(weights, inputs)
    settings = Adaptive(soft_fractions=(1e-9,), steps=1, batch_size=32, learning_rate=0.0, scale_learning_rate=0.0)
    losses = []
    for targets in ([target], [target + 1], [target, target + 1]):
        round_block(
            weights, starts_of(weights, W2), Goal(block, inputs, targets), settings,
            after_round=lambda state: losses.append(float(state.losses[0])),
        )  # fmt: skip
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=1e-5)


@pytest.mark.parametrize("setting", [{"start": "nearest"}, {"both_targets": 1.5}, {"tune_scales": "yes"}])
def test_a_setting_that_is_no_choice_is_refused(setting):
    ((key, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{key} {value!r} is not one of .* \(adaptive\)"):
        Adaptive(**setting)
