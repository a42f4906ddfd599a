"""What the methods are made of and what equals what, on random weights and correlated heavy-tailed inputs.

Shapes: I in_features, O out_features, R rank, T tokens.
"""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lqer.methods
from lqer.formats import Codebook, Int, MXInt, Passthrough
from lqer.methods import METHODS, LinearPlan, QeraExact, QuantizedWeight
from lqer.methods.base import Statistics

# The reconstructions of one and the same W_q = round(W).
OF_THE_ROUNDED_WEIGHT = ("lqer-svd", "zeroquant-v2", "lqer-act", "qera-approx", "qera-exact", "eora")


def statistics_of(x_TI: Tensor) -> dict[str, Tensor]:
    return {
        "mean_abs": x_TI.abs().mean(0),
        "mean_square": x_TI.square().mean(0),
        "max_abs": x_TI.abs().amax(0),
        "hessian": (x_TI.T.double() @ x_TI.double() / len(x_TI)).float(),
    }


def layer(seed: int, in_features: int = 128, out_features: int = 96) -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(out_features, in_features, generator=generator) * 0.05
    mixing_II = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    x_TI = torch.randn(1000, in_features, generator=generator) @ mixing_II
    return weight_OI, statistics_of(x_TI * torch.randn(in_features, generator=generator).exp())


@pytest.fixture
def plan() -> LinearPlan:
    """3-bit weights, factors that are not rounded."""
    return LinearPlan(
        method=QeraExact(),
        weight=MXInt(bits=3, block_size=32),
        activation=None,
        bias=None,
        rank=8,
        factor=Passthrough("float32"),
        factor_axis="reduction",
    )


def quantize(weight_OI: Tensor, statistics: Statistics, plan: LinearPlan, method: str) -> QuantizedWeight:
    plan = replace(plan, method=METHODS[method](), rank=plan.rank if METHODS[method].reconstructs else 0)
    return plan.quantize(weight_OI, statistics)


def weighted_error(weight_OI: Tensor, effective_OI: Tensor, statistics: Statistics) -> float:
    error_OI = weight_OI.double() - effective_OI.double()
    return float((error_OI @ statistics["hessian"].double() * error_OI).sum())


@pytest.mark.parametrize("seed", range(8))
def test_in_the_norm_of_the_inputs_qera_exact_is_at_most_every_other_reconstruction(plan, seed):
    weight_OI, statistics = layer(seed)
    errors = {
        method: weighted_error(weight_OI, quantize(weight_OI, statistics, plan, method).effective_weight(), statistics)
        for method in OF_THE_ROUNDED_WEIGHT
    }
    assert all(errors["qera-exact"] <= error * (1 + 1e-6) for error in errors.values()), errors
    assert errors["qera-exact"] < 0.98 * errors["qera-approx"]


def test_what_qera_exact_leaves_is_the_tail_of_the_weighted_spectrum(plan):
    weight_OI, statistics = layer(0)
    quantized = quantize(weight_OI, statistics, plan, "qera-exact")
    eigenvalues_I, vectors_II = torch.linalg.eigh(statistics["hessian"].double())
    root_II = vectors_II * eigenvalues_I.clamp(min=0).sqrt() @ vectors_II.T
    error_OI = weight_OI.double() - plan.weight.quantize(weight_OI).dequantize().double()
    sigma_K = torch.linalg.svdvals(root_II @ error_OI.T)
    left = weighted_error(weight_OI, quantized.effective_weight(), statistics)
    assert left == pytest.approx(float(sigma_K[8:].square().sum()), rel=1e-5)
    assert quantized.low_rank is not None
    captured = 1 - left / weighted_error(weight_OI, plan.weight.quantize(weight_OI).dequantize(), statistics)
    assert quantized.low_rank.captured_energy == pytest.approx(captured, abs=1e-5)


def test_on_average_activation_scales_are_better_than_none(plan):
    sums = dict.fromkeys(OF_THE_ROUNDED_WEIGHT, 0.0)
    for seed in range(8):
        weight_OI, statistics = layer(seed)
        plain = weighted_error(weight_OI, plan.weight.quantize(weight_OI).dequantize(), statistics)
        for method in sums:
            effective_OI = quantize(weight_OI, statistics, plan, method).effective_weight()
            sums[method] += weighted_error(weight_OI, effective_OI, statistics) / plain
    assert sums["lqer-act"] < sums["lqer-svd"]
    assert sums["qera-approx"] < sums["lqer-svd"]


def equal(one: QuantizedWeight, other: QuantizedWeight) -> None:
    torch.testing.assert_close(one.effective_weight(), other.effective_weight(), rtol=1e-4, atol=1e-6)


def test_uncorrelated_equal_inputs_make_qera_exact_the_plain_svd(plan):
    weight_OI, statistics = layer(0)
    statistics = {**statistics, "hessian": 0.3 * torch.eye(128)}
    equal(quantize(weight_OI, statistics, plan, "qera-exact"), quantize(weight_OI, statistics, plan, "lqer-svd"))


def test_uncorrelated_inputs_make_qera_exact_qera_approx(plan):
    weight_OI, statistics = layer(0)
    statistics = {**statistics, "hessian": statistics["mean_square"].diag()}
    equal(quantize(weight_OI, statistics, plan, "qera-exact"), quantize(weight_OI, statistics, plan, "qera-approx"))


@pytest.mark.parametrize(("one", "other"), [("eora", "qera-exact"), ("zeroquant-v2", "lqer-svd")])
def test_two_names_of_one_method_give_the_same_bytes(plan, one, other):
    weight_OI, statistics = layer(0)
    first, second = (quantize(weight_OI, statistics, plan, method).low_rank for method in (one, other))
    assert torch.equal(first.a_IR.dequantize(), second.a_IR.dequantize())
    assert torch.equal(first.b_RO.dequantize(), second.b_RO.dequantize())


def test_loftq_of_one_iteration_is_the_plain_svd(plan):
    weight_OI, statistics = layer(0)
    loftq, svd = (quantize(weight_OI, statistics, plan, method) for method in ("loftq", "lqer-svd"))
    assert torch.equal(loftq.effective_weight(), svd.effective_weight())


def test_loftqs_iterations_follow_its_algorithm_and_lower_the_error_of_the_weight(plan):
    weight_OI, statistics = layer(0)
    product_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
    for _ in range(5):
        rounded_OI = plan.weight.quantize((weight_OI - product_OI).float()).dequantize().double()
        u_OK, sigma_K, vt_KI = torch.linalg.svd(weight_OI.double() - rounded_OI, full_matrices=False)
        product_OI = u_OK[:, :8] * sigma_K[:8] @ vt_KI[:8]
    found = quantize(weight_OI, statistics, replace(plan, iterations=5), "loftq")
    # A weight next to a rounding threshold may fall to either side.
    assert (found.weight_OI.dequantize().double() - rounded_OI).abs().gt(1e-6).float().mean() < 0.01
    errors = [
        float(
            (
                weight_OI - quantize(weight_OI, statistics, replace(plan, iterations=n), "loftq").effective_weight()
            ).norm()
        )
        for n in (1, 5)
    ]
    assert errors[1] < errors[0]


def test_svdquant_rounds_what_the_low_rank_part_of_the_smoothed_weight_leaves(plan):
    weight_OI, statistics = layer(0)
    found = quantize(weight_OI, statistics, plan, "svdquant")
    lambda_I = (statistics["max_abs"].double() / weight_OI.abs().amax(0).double()).sqrt()
    u_IK, sigma_K, vt_KO = torch.linalg.svd(lambda_I[:, None] * weight_OI.T.double(), full_matrices=False)
    product_OI = (u_IK[:, :8] * sigma_K[:8] @ vt_KO[:8] / lambda_I[:, None]).T
    torch.testing.assert_close(found.low_rank.product().double(), product_OI, rtol=1e-4, atol=1e-6)
    residual_OI = weight_OI - found.low_rank.product()
    assert torch.equal(found.weight_OI.dequantize(), plan.weight.quantize(residual_OI).dequantize())


def test_rounding_sees_the_factors_as_they_are_stored(plan):
    weight_OI, statistics = layer(0)
    for method, iterations in (("svdquant", 1), ("loftq", 3)):
        found = quantize(weight_OI, statistics, replace(plan, factor=MXInt(4), iterations=iterations), method)
        if method == "svdquant":
            residual_OI = weight_OI - found.low_rank.product()
            assert torch.equal(found.weight_OI.dequantize(), plan.weight.quantize(residual_OI).dequantize())
        assert found.low_rank.a_IR.format == MXInt(4)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.reconstructs])
def test_full_rank_restores_the_weight_and_rank_zero_rounds_it(plan, method):
    weight_OI, statistics = layer(0, in_features=48, out_features=32)
    full = quantize(weight_OI, statistics, replace(plan, rank=100), method)
    torch.testing.assert_close(full.effective_weight(), weight_OI, rtol=1e-4, atol=1e-6)
    none = quantize(weight_OI, {}, replace(plan, rank=0), method)
    assert none.low_rank is None
    assert torch.equal(none.effective_weight(), plan.weight.quantize(weight_OI).dequantize())


@pytest.mark.parametrize("method", ["qera-approx", "qera-exact", "svdquant"])
def test_the_product_does_not_depend_on_the_unit_of_the_inputs(plan, method):
    weight_OI, statistics = layer(0)
    powers = {"mean_abs": 1, "max_abs": 1, "mean_square": 2, "hessian": 2}
    louder = {key: value * 8.0 ** powers[key] for key, value in statistics.items()}
    equal(quantize(weight_OI, statistics, plan, method), quantize(weight_OI, louder, plan, method))


@pytest.mark.parametrize("weight", [Int(bits=3, block_size=32), Codebook(bits=2, dimension=2, group_size=512)])
def test_a_low_rank_part_on_top_of_error_feedback_is_that_of_qera_exact_for_what_is_left(plan, weight):
    method = "gptq" if isinstance(weight, Int) else "gptvq"
    weight_OI, statistics = layer(4)
    plan = replace(plan, weight=weight, rounding=METHODS[method].rounding)
    alone = quantize(weight_OI, statistics, replace(plan, rank=0), method)
    assert alone.low_rank is None
    found = quantize(weight_OI, statistics, plan, method)
    assert torch.equal(found.weight_OI.dequantize(), alone.weight_OI.dequantize())
    equal(found, quantize(weight_OI, statistics, plan, "qera-exact"))
    errors = [weighted_error(weight_OI, part.effective_weight(), statistics) for part in (found, alone)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("method", METHODS)
def test_methods_ask_for_the_statistics_that_they_read(plan, method):
    weight_OI, statistics = layer(0)
    plan = replace(plan, method=METHODS[method](), rank=8 if METHODS[method].reconstructs else 0)
    wanted = plan.method.statistics_for(plan)
    plan.quantize(weight_OI, {statistic.kind: statistics[statistic.kind] for statistic in wanted})
    assert plan.method.statistics_for(replace(plan, rank=0)) == frozenset()
    assert plan.method.statistics_for(replace(plan, rank=None)) == METHODS[method].statistics


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dead", ["some", "all"])
def test_channels_without_any_input_leave_finite_factors(plan, method, dead):
    weight_OI, _ = layer(0)
    x_TI = torch.randn(500, 128, generator=torch.Generator().manual_seed(3))
    x_TI[:, slice(0, 20) if dead == "some" else slice(None)] = 0
    weight_OI[:, 5:9] = 0
    found = quantize(weight_OI, statistics_of(x_TI), replace(plan, factor=Passthrough("float16")), method)
    assert found.effective_weight().isfinite().all()


def test_the_example_of_the_package_is_true():
    found = doctest.testmod(lqer.methods)
    assert (found.failed, found.attempted) == (0, 7)
