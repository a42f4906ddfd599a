from __future__ import annotations

import pytest
import torch
from helpers import first_block
from safetensors.torch import load, save
from torch.nn import functional as F

from lqer.formats import Int, MXInt
from lqer.methods.block import reconstruct_block
from lqer.models.structure import block_linears
from lqer.rounding.batches import Goal
from lqer.transforms import Lwc
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.clip import SHRINK_FACTORS, group_range, search_block
from lqer.transforms.learnt_ranges import (
    START,
    ClippingSettings,
    ClippingState,
    RangeFactors,
    _rounded,
    learn_clipping,
    quantize_learnt,
    start_at,
)

FORMATS = [Int(bits=2, block_size=16), Int(bits=3, block_size="row"), Int(bits=3, block_size=16, symmetric=True)]


@pytest.fixture(scope="module")
def task():
    """A block of two linears with outliers in every row, correlated inputs, and what it makes of them."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(32, 40, generator=generator) for name in ("up", "gate")}
    for weight in weights.values():
        weight[:, 7::16] *= 3
    inputs = torch.randn(64, 6, 40, generator=generator) @ torch.randn(40, 40, generator=generator) / 6

    def block(weights, x):
        return F.linear(x, weights["up"]) + F.silu(F.linear(x, weights["gate"]))

    return weights, block, inputs, block(weights, inputs)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_learning_lowers_the_loss_also_on_inputs_it_has_not_seen(task, number_format):
    weights, block, inputs, targets = task
    formats = dict.fromkeys(weights, number_format)
    settings = ClippingSettings(epochs=10, batch_size=2)
    factors = learn_clipping(weights, formats, Goal(block, inputs[:48], [targets[:48]]), settings)

    def loss(rounded, part):
        values = {name: tensor.dequantize() for name, tensor in rounded.items()}
        return float((block(values, inputs[part]) - targets[part]).square().mean())

    learnt = {name: quantize_learnt(weight, number_format, factors[name]) for name, weight in weights.items()}
    plain = {name: number_format.quantize(weight) for name, weight in weights.items()}
    for part in (slice(0, 48), slice(48, 64)):
        assert loss(learnt, part) < loss(plain, part)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_what_is_trained_is_what_is_stored(task, number_format):
    weight_OI = task[0]["up"].clone()
    weight_OI[2, :16] = 0
    ends = group_range(weight_OI, number_format)
    logits = torch.randn(2, *ends[0].shape, generator=torch.Generator().manual_seed(5)) + 2
    trained_OI = _rounded(weight_OI, number_format, torch.stack(ends), logits, torch.float32)

    factors = RangeFactors(*logits.sigmoid())
    assert torch.equal(trained_OI, quantize_learnt(weight_OI, number_format, factors).dequantize())


def test_every_group_starts_at_sigmoid_four(task):
    weights, block, inputs, targets = task
    settings = ClippingSettings(epochs=1, learning_rate=0.0)
    formats = dict.fromkeys(weights, FORMATS[0])
    factors = learn_clipping(weights, formats, Goal(block, inputs[:2], [targets[:2]]), settings)
    start = torch.tensor(START).sigmoid()
    assert all((f.low_ON == start).all() and (f.high_ON == start).all() for f in factors.values())


def test_several_targets_pull_together(task):
    weights, block, inputs, targets = task
    formats = dict.fromkeys(weights, FORMATS[0])
    settings = ClippingSettings(epochs=1, batch_size=2)
    once = learn_clipping(weights, formats, Goal(block, inputs, [targets]), settings)
    other = learn_clipping(weights, formats, Goal(block, inputs, [targets, targets * 0.5]), settings)
    assert not torch.equal(once["up"].high_ON, other["up"].high_ON)


def test_going_on_after_any_epoch_learns_the_same_factors(task):
    weights, block, inputs, targets = task
    files = []
    arguments = (weights, dict.fromkeys(weights, FORMATS[0]), Goal(block, inputs, [targets]), ClippingSettings(4, 3))
    whole = learn_clipping(*arguments, after_epoch=lambda state: files.append(save(state.tensors())))
    assert len(files) == 4
    for epochs, file in enumerate(files, start=1):
        state = ClippingState.from_tensors(load(file))
        assert state.epochs == epochs
        later = []
        resumed = learn_clipping(*arguments, state=state, after_epoch=later.append)
        assert len(later) == 4 - epochs
        assert save(state.tensors()) == file
        for name, factors in whole.items():
            assert torch.equal(factors.low_ON, resumed[name].low_ON)
            assert torch.equal(factors.high_ON, resumed[name].high_ON)


def test_a_power_of_two_scale_is_refused(task):
    weights, block, inputs, targets = task
    with pytest.raises(ValueError, match=r"up: clipping is learnt for the scales of int, found mxint"):
        learn_clipping(
            weights, {"up": MXInt(4), "gate": FORMATS[0]}, Goal(block, inputs, [targets]), ClippingSettings()
        )


def test_a_loss_that_is_not_finite_ends_it(task):
    weights, block, inputs, targets = task
    with pytest.raises(ArithmeticError, match=r"epoch 1 of 20 diverged: its loss is nan"):
        learn_clipping(
            weights, dict.fromkeys(weights, FORMATS[0]), Goal(block, inputs, [targets * torch.nan]), ClippingSettings()
        )


def test_learning_can_start_at_searched_ranges(random_model, windows_WT):
    """Before the first epoch the ranges are those that clipping finds, where they are below the usual start."""
    _, call, hidden_STD = first_block(random_model("llama"), windows_WT)
    with torch.no_grad():
        targets_STD = call({}, hidden_STD)
    number_format = Int(bits=2, block_size=16)
    problem = BlockProblem(call, hidden_STD, targets_STD, dict.fromkeys(block_linears(call.block), number_format), 2)
    found = search_block(problem, BlockResult(), SHRINK_FACTORS)
    most = torch.tensor(4.0).sigmoid()
    for name, logits_2ON in start_at(found).logits.items():
        expected_ON = torch.minimum(found[name], most)
        torch.testing.assert_close(logits_2ON.sigmoid(), torch.stack([expected_ON, expected_ON]))
    losses = {}
    for start in ("full", "search"):
        result = reconstruct_block(problem, [Lwc(epochs=2, batch_size=2, start=start)], None)
        losses[start] = result.notes["lwc"][0]
    assert losses["search"] < losses["full"]


def test_a_weight_that_no_input_reaches_keeps_its_range_and_has_a_state_to_resume_from(task):
    """As those of an expert that no token is sent to."""
    weights, block, inputs, targets = task
    apart = {**weights, "unreached": weights["up"]}
    states = []
    settings = ClippingSettings(epochs=2, batch_size=8)
    factors = learn_clipping(
        apart, dict.fromkeys(apart, FORMATS[0]), Goal(block, inputs, [targets]), settings, after_epoch=states.append
    )
    assert torch.equal(factors["unreached"].low_ON, torch.full_like(factors["unreached"].low_ON, START).sigmoid())
    assert states[-1].means.keys() == apart.keys()
    assert (factors["up"].low_ON != factors["unreached"].low_ON).any()
