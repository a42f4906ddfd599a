"""The asymmetric target: least squares against the original's outputs.

Shapes: I in_features, O out_features, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lqer.formats import Int, NonFiniteError
from lqer.methods import LinearPlan, QeraExact, RoundingOnly
from lqer.methods.asymmetric import DAMPING, asymmetric_target
from lqer.rounding import Gptq, Nearest
from lqer.stages.base import identity
from lqer.statistics import Hessian, Mismatch
from lqer.transforms.hadamard import Hadamard


@pytest.fixture
def layer():
    """weight_OI, the original's inputs and the quantized model's."""
    generator = torch.Generator().manual_seed(0)
    mixing_II = torch.randn(64, 64, generator=generator) / 8
    original_TI = torch.randn(800, 64, generator=generator) @ mixing_II
    x_TI = 0.9 * original_TI + 0.2 * torch.randn(800, 64, generator=generator)
    return torch.randn(48, 64, generator=generator), original_TI, x_TI


def moments(original_TI, x_TI):
    original_TI, x_TI = original_TI.double(), x_TI.double()
    hessian_II, mismatch_II = x_TI.T @ x_TI / len(x_TI), (original_TI - x_TI).T @ x_TI / len(x_TI)
    return {"hessian": hessian_II.float(), "mismatch": mismatch_II.float(), "mean_square": hessian_II.diagonal()}


def plan(**changes):
    usual = LinearPlan(RoundingOnly(), Int(3, 32), rounding=Gptq())
    return replace(usual, **changes)


def output_error(weight_OI, original_TI, effective_OI, x_TI) -> float:
    return float((original_TI @ weight_OI.T - x_TI @ effective_OI.T).square().mean())


def test_it_is_damped_least_squares_against_the_original_outputs(layer):
    weight_OI, original_TI, x_TI = (x.double() for x in layer)
    found = moments(original_TI, x_TI)
    mean = found["hessian"].double().diagonal().mean()
    # Ridge regression of what the outputs lack on the inputs.
    missing_TO = (original_TI - x_TI) @ weight_OI.T
    rows_TI = torch.cat([x_TI / len(x_TI) ** 0.5, (DAMPING * mean).sqrt() * torch.eye(64)])
    correction_IO = torch.linalg.lstsq(
        rows_TI, torch.cat([missing_TO / len(x_TI) ** 0.5, torch.zeros(64, 48)])
    ).solution
    target_OI = asymmetric_target(weight_OI.float(), found["hessian"], found["mismatch"], 1.0)
    torch.testing.assert_close(target_OI.double(), weight_OI + correction_IO.T, rtol=1e-4, atol=1e-4)


def test_more_of_it_comes_closer_to_the_original_outputs(layer):
    weight_OI, original_TI, x_TI = layer
    found = moments(original_TI, x_TI)
    errors = [
        output_error(weight_OI, original_TI, asymmetric_target(weight_OI, found["hessian"], found["mismatch"], a), x_TI)
        for a in (0.0, 0.25, 0.5, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_equal_streams_make_the_target_the_weight(layer):
    weight_OI, original_TI, _ = layer
    found = moments(original_TI, original_TI)
    assert torch.equal(asymmetric_target(weight_OI, found["hessian"], found["mismatch"], 1.0), weight_OI)


def test_inputs_that_were_never_seen_change_nothing(layer):
    weight_OI, original_TI, x_TI = layer
    x_TI[:, 3] = 0
    found = moments(original_TI, x_TI)
    target_OI = asymmetric_target(weight_OI, found["hessian"], found["mismatch"], 1.0)
    assert torch.equal(target_OI[:, 3], weight_OI[:, 3])
    nothing_II = torch.zeros(64, 64)
    assert torch.equal(asymmetric_target(weight_OI, nothing_II, nothing_II, 1.0), weight_OI)


@pytest.mark.parametrize("rounding", [Gptq(), Nearest(scales="search")], ids=lambda rounding: rounding.kind)
def test_without_strength_nothing_is_asked_for_and_nothing_changes(layer, rounding):
    symmetric = plan(rounding=rounding)
    assert Mismatch() not in symmetric.method.statistics_for(symmetric)
    assert "asymmetric" not in identity(symmetric)
    found = moments(*layer[1:])
    direct = rounding.round(layer[0], found, symmetric.weight)
    for name, part in symmetric.quantize(layer[0], found).weight_OI.parts.items():
        assert torch.equal(part, direct.parts[name])


def test_with_strength_the_target_is_rounded_and_reconstructed(layer):
    weight_OI, original_TI, x_TI = layer
    found = moments(original_TI, x_TI)
    asymmetric = plan(asymmetric=0.5)
    assert asymmetric.method.statistics_for(asymmetric) == {Hessian(), Mismatch()}
    target_OI = asymmetric_target(weight_OI, found["hessian"], found["mismatch"], 0.5)
    for changes in ({}, {"method": QeraExact(), "rank": 8}):
        effective_OI = replace(asymmetric, **changes).quantize(weight_OI, found).effective_weight()
        expected_OI = plan(**changes).quantize(target_OI, found).effective_weight()
        assert torch.equal(effective_OI, expected_OI)
        plain_OI = plan(**changes).quantize(weight_OI, found).effective_weight()
        errors = [output_error(weight_OI, original_TI, x, x_TI) for x in (effective_OI, plain_OI)]
        assert errors[0] < errors[1]


def test_a_rotated_linear_has_the_rotated_target(layer):
    weight_OI, original_TI, x_TI = layer
    found = moments(original_TI, x_TI)
    rotated = plan(asymmetric=0.5, transform=Hadamard(), seed=3)
    assert rotated.method.statistics_for(rotated) == {Hessian(), Mismatch()}
    target = rotated.method.target(weight_OI, found, rotated)
    straight_OI = asymmetric_target(weight_OI, found["hessian"], found["mismatch"], 0.5)
    torch.testing.assert_close(target.weight_OI, target.rotation.weight(straight_OI), rtol=0, atol=1e-4)


def test_a_weight_that_is_not_finite_is_refused(layer):
    with pytest.raises(NonFiniteError, match="1 infinite"):
        plan(asymmetric=0.5).quantize(torch.full((1, 1), torch.inf), {})
