"""LQER and L²QER on one weight: what the definition says, step by step.

Shapes: I in_features, O out_features, R rank, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lqer.formats import MXInt, NonFiniteError, Passthrough
from lqer.lowrank.scaling import activation_scale
from lqer.methods import METHODS, LinearPlan, LqerAct, LqerSvd, QuantizedWeight

EXACT = Passthrough("float32")


@pytest.fixture
def weight_OI() -> Tensor:
    return torch.randn(48, 40, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def statistics() -> dict[str, Tensor]:
    return {"mean_abs": torch.logspace(-1.5, 1.5, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]}


@pytest.fixture
def exact_plan() -> LinearPlan:
    """3-bit weights, factors that are not rounded."""
    return LinearPlan(
        method=LqerAct(),
        weight=MXInt(bits=3),
        activation=None,
        bias=None,
        rank=6,
        factor=EXACT,
        factor_axis="reduction",
    )


def quantize(weight_OI: Tensor, statistics: dict[str, Tensor], plan: LinearPlan) -> QuantizedWeight:
    return plan.quantize(weight_OI, statistics)


def product(weight: QuantizedWeight) -> Tensor:
    """(A·B)ᵀ, (out, in)."""
    assert weight.low_rank is not None
    return (weight.low_rank.a_IR.dequantize().double() @ weight.low_rank.b_RO.dequantize().double()).T


def scaled_loss(weight_OI: Tensor, approximation_OI: Tensor, scale_I: Tensor) -> float:
    return float(((weight_OI.double() - approximation_OI.double()) * scale_I.double()).norm())


def test_the_weight_is_rounded_once_whatever_the_rank(weight_OI, statistics, exact_plan, round_mxint):
    for rank in (0, 6):
        weight = quantize(weight_OI, statistics, replace(exact_plan, rank=rank))
        assert torch.equal(weight.weight_OI.dequantize().double(), round_mxint(weight_OI, 3))


def test_rank_zero_is_plain_rounding(weight_OI, statistics, exact_plan):
    without = quantize(weight_OI, statistics, replace(exact_plan, rank=0))
    plain = quantize(weight_OI, {}, exact_plan.without_low_rank())
    assert without.low_rank is None
    assert plain.low_rank is None
    assert torch.equal(without.effective_weight(), plain.effective_weight())


@pytest.mark.parametrize("method", ["lqer-svd", "lqer-act"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_loss_that_is_left_is_the_tail_of_the_scaled_errors_spectrum(
    weight_OI, statistics, exact_plan, round_mxint, method, transposed
):
    if transposed:
        weight_OI, statistics = weight_OI.T.contiguous(), {"mean_abs": torch.logspace(-1.5, 1.5, 48)}
    scale_I = activation_scale(statistics["mean_abs"]) if method == "lqer-act" else torch.ones(weight_OI.shape[1])
    weight = quantize(weight_OI, statistics, replace(exact_plan, method=METHODS[method]()))
    rounded_OI = round_mxint(weight_OI, 3)
    sigma_K = torch.linalg.svdvals((weight_OI.double() - rounded_OI) * scale_I.double())
    loss = scaled_loss(weight_OI, rounded_OI + product(weight), scale_I)
    assert loss == pytest.approx(float(sigma_K[6:].norm()), rel=1e-6)


def test_each_method_is_best_under_its_own_scale(weight_OI, statistics, exact_plan):
    scale_I = activation_scale(statistics["mean_abs"])
    act = quantize(weight_OI, statistics, exact_plan).effective_weight()
    svd = quantize(weight_OI, statistics, replace(exact_plan, method=LqerSvd())).effective_weight()
    ones_I = torch.ones(40)
    assert scaled_loss(weight_OI, act, scale_I) < scaled_loss(weight_OI, svd, scale_I)
    assert scaled_loss(weight_OI, svd, ones_I) < scaled_loss(weight_OI, act, ones_I)


def test_equal_statistics_make_l2qer_the_plain_svd(weight_OI, exact_plan):
    act = quantize(weight_OI, {"mean_abs": torch.full((40,), 0.37)}, exact_plan)
    svd = quantize(weight_OI, {}, replace(exact_plan, method=LqerSvd()))
    torch.testing.assert_close(act.effective_weight(), svd.effective_weight(), rtol=1e-5, atol=1e-7)


def test_the_product_does_not_depend_on_the_unit_of_the_statistics(weight_OI, statistics, exact_plan):
    one = quantize(weight_OI, statistics, exact_plan)
    other = quantize(weight_OI, {"mean_abs": 8 * statistics["mean_abs"]}, exact_plan)
    torch.testing.assert_close(product(one), product(other), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [40, 64])
def test_full_rank_and_more_restores_the_weight(weight_OI, statistics, exact_plan, rank):
    weight = quantize(weight_OI, statistics, replace(exact_plan, rank=rank))
    assert weight.low_rank is not None
    assert weight.low_rank.rank == 40
    torch.testing.assert_close(weight.effective_weight(), weight_OI, rtol=1e-5, atol=1e-6)


def test_a_weight_that_rounding_does_not_change_gets_a_branch_of_zeros(statistics, exact_plan):
    weight = quantize(torch.full((48, 40), 0.375), statistics, exact_plan)
    assert not product(weight).any()
    assert torch.equal(weight.effective_weight(), torch.full((48, 40), 0.375))


@pytest.mark.parametrize(("name", "axis"), [("reduction", 0), ("lqer", 1)])
@pytest.mark.parametrize("rank", [6, 16, 20])
def test_factors_are_rounded_along_the_stated_axis(weight_OI, statistics, exact_plan, round_mxint, name, axis, rank):
    exact = quantize(weight_OI, statistics, replace(exact_plan, rank=rank)).low_rank
    plan = replace(exact_plan, rank=rank, factor=MXInt(bits=8), factor_axis=name)
    rounded = quantize(weight_OI, statistics, plan).low_rank
    assert torch.equal(rounded.a_IR.dequantize().double(), round_mxint(exact.a_IR.dequantize(), 8, axis))
    assert torch.equal(rounded.b_RO.dequantize().double(), round_mxint(exact.b_RO.dequantize(), 8, axis))


def test_bits_of_the_branch_are_codes_and_exponents_of_both_factors(weight_OI, statistics, exact_plan):
    plan = replace(exact_plan, rank=16, factor=MXInt(bits=8))
    weight = quantize(weight_OI, statistics, plan)
    # A: 40 x 16 in blocks along 40 (three a column), B: 16 x 48 in blocks along 16 (one a column).
    assert weight.low_rank.bits == 8 * (40 * 16 + 3 * 16) + 8 * (16 * 48 + 48)


def test_half_precision_weights_are_computed_on_in_float32(weight_OI, statistics, exact_plan):
    half_OI = weight_OI.to(torch.bfloat16)
    a, b = (quantize(w, statistics, exact_plan).effective_weight() for w in (half_OI, half_OI.to(torch.float32)))
    assert torch.equal(a, b)


def test_a_weight_with_nan_is_refused(weight_OI, statistics, exact_plan):
    weight_OI[3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="1 NaN and 0 infinite"):
        quantize(weight_OI, statistics, exact_plan)
