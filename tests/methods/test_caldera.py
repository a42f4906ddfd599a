"""CALDERA: what an alternation keeps, what each of its steps is, and what it is without one of them.

Shapes: I in_features, O out_features, R rank, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lqer.formats import E8P, Int, MXInt, NonFiniteError, Passthrough, Trellis
from lqer.lowrank.metric import Metric
from lqer.methods import Caldera, LinearPlan, QeraExact, QuantizedWeight
from lqer.methods.caldera import State, alternate
from lqer.rounding import Ldlq, Nearest
from lqer.rounding.hessian import damp
from lqer.transforms import Hadamard

IN, OUT = 128, 96
FOUR_BITS = E8P(4, block_size="row", scale_dtype="float16")


def layer(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight with a few outlier directions, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(OUT, IN, generator=generator) * 0.05
    weight_OI += torch.randn(OUT, 4, generator=generator) @ torch.randn(4, IN, generator=generator) * 0.05
    mixing_II = torch.randn(IN, IN, generator=generator) / IN**0.5
    x_TI = torch.randn(1000, IN, generator=generator) @ mixing_II
    return weight_OI, {"hessian": x_TI.T @ x_TI / len(x_TI)}


@pytest.fixture
def plan() -> LinearPlan:
    return LinearPlan(Caldera(), E8P(2), None, None, 16, FOUR_BITS, "outer", rounding=Ldlq(), iterations=5)


HALVES = Passthrough("float16")


def quantize(plan: LinearPlan, seed: int = 0) -> QuantizedWeight:
    weight_OI, statistics = layer(seed)
    return plan.quantize(weight_OI, statistics)


def relative_error(found: QuantizedWeight, seed: int = 0) -> float:
    """Under the damped H, in float64."""
    weight_OI, statistics = layer(seed)
    hessian_II = damp(statistics["hessian"], 0.01).hessian_II
    left_OI = weight_OI.double() - found.effective_weight().double()
    energy = lambda x_OI: float((x_OI @ hessian_II * x_OI).sum())  # noqa: E731
    return (energy(left_OI) / energy(weight_OI.double())) ** 0.5


@pytest.mark.parametrize("starts_with", ["reconstruct", "round"])
@pytest.mark.parametrize("factor", [FOUR_BITS, HALVES])
def test_of_all_states_with_both_parts_the_best_is_returned(plan, starts_with, factor):
    found = quantize(replace(plan, factor=factor, method=Caldera(starts_with=starts_with)))
    assert len(found.errors) == 2 * plan.iterations
    assert relative_error(found) == pytest.approx(min(found.errors[1:]), rel=1e-3)


def test_more_iterations_never_return_a_worse_state(plan):
    errors = [relative_error(quantize(replace(plan, iterations=iterations))) for iterations in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def test_a_state_counts_once_both_parts_are_there():
    weight_OI = torch.ones(8, 8)
    rounded = Passthrough().quantize(weight_OI)
    found = LinearPlan(QeraExact(), MXInt(2), rank=1, factor=HALVES, factor_axis="outer").quantize(
        weight_OI, {"hessian": torch.eye(8)}
    )

    def reconstruct_step(state: State) -> State:
        return replace(state, low_rank=found.low_rank)

    def round_step(state: State) -> State:
        return replace(state, rounded=rounded)

    best, errors = alternate(weight_OI, Metric(), [round_step, reconstruct_step], 1)
    assert errors[0] == 0, "the weight itself, which is no decomposition yet"
    assert best.low_rank is found.low_rank


def test_errors_that_are_never_finite_are_said_so():
    broken = State(rounded=Passthrough().quantize(torch.ones(8, 8)))
    with pytest.raises(NonFiniteError, match="none of 2 iterations ended with a finite error"):
        alternate(torch.full((8, 8), torch.nan), Metric(), [lambda state: broken], 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("down_date", [0.0, 1.0])
def test_a_reconstruction_in_halves_never_raises_the_error(plan, seed, down_date):
    errors = quantize(replace(plan, factor=HALVES, method=Caldera(down_date=down_date)), seed).errors
    before = [1.0, *errors[1::2]]
    assert all(after <= error * (1 + 1e-4) for error, after in zip(before, errors[::2]))


def test_the_reconstruction_in_halves_is_the_papers_closed_form(plan):
    """Y = Z Hˢ V, L = U_r, R = Σ_r P_rᵀ Λ^{-1/2} Vᵀ, which is QERA-exact on the same Z and H."""
    weight_OI, statistics = layer(0)
    found = quantize(replace(plan, factor=Passthrough("float32"), iterations=1, method=Caldera("round")))
    residual_OI = weight_OI.double() - found.weight_OI.dequantize().double()
    eigenvalues_I, vectors_II = torch.linalg.eigh(damp(statistics["hessian"], 0.01).hessian_II)
    u_OK, sigma_K, pt_KI = torch.linalg.svd(residual_OI @ vectors_II * eigenvalues_I.sqrt(), full_matrices=False)
    right_RI = sigma_K[:16, None] * pt_KI[:16] / eigenvalues_I.sqrt() @ vectors_II.T
    torch.testing.assert_close(found.low_rank.product().double(), u_OK[:, :16] @ right_RI, rtol=1e-4, atol=1e-6)


def test_without_a_rank_it_is_the_rounding_alone(plan):
    weight_OI, statistics = layer(0)
    found = quantize(replace(plan, rank=0))
    assert found.low_rank is None
    expected = plan.rounding.round(weight_OI, statistics, plan.weight)
    assert torch.equal(found.effective_weight(), expected.dequantize())


def test_a_higher_rank_leaves_less_on_average(plan):
    means = [
        sum(relative_error(quantize(replace(plan, rank=rank, iterations=2), seed), seed) for seed in range(4))
        for rank in (0, 16, 32, 48)
    ]
    assert means == sorted(means, reverse=True)


def test_alternating_is_better_than_rounding_then_reconstructing(plan):
    once = replace(plan, iterations=1, method=Caldera("round", down_date=0.0))
    for seed in range(3):
        assert relative_error(quantize(plan, seed), seed) < 0.97 * relative_error(quantize(once, seed), seed)


def test_a_down_date_lets_rounding_leave_what_the_low_rank_part_mends(plan):
    halves = replace(plan, factor=HALVES)
    for seed in range(3):
        with_it, without = (quantize(replace(halves, method=Caldera(down_date=share)), seed) for share in (1.0, 0.0))
        assert with_it.errors[1] > 1.5 * without.errors[1], "after rounding, before the next reconstruction"
        assert min(with_it.errors) < min(without.errors)


def test_a_and_b_may_have_bits_of_their_own(plan):
    found = quantize(replace(plan, factor_b=E8P(2)))
    assert (found.low_rank.a_IR.format, found.low_rank.b_RO.format) == (FOUR_BITS, E8P(2))
    assert (found.low_rank.a_IR.axis, found.low_rank.b_RO.axis) == (0, 1)
    both = [relative_error(quantize(replace(plan, factor=factor))) for factor in (E8P(2), FOUR_BITS, HALVES)]
    assert both == sorted(both, reverse=True)
    assert both[1] < relative_error(found) < both[0]


@pytest.mark.parametrize("weight", [MXInt(3), E8P(3)])
@pytest.mark.parametrize("rounding", [Nearest(), Ldlq(tune_iters=1)])
def test_it_goes_with_any_format_rounding_and_basis(plan, weight, rounding):
    plain = replace(plan, weight=weight, rounding=rounding, factor=MXInt(4), iterations=2)
    rotated = replace(plain, transform=Hadamard())
    rounded_alone = replace(plain.without_low_rank(), transform=Hadamard())
    weight_OI, statistics = layer(1)
    alone = rounded_alone.quantize(weight_OI, statistics)
    assert relative_error(quantize(rotated, 1), 1) < relative_error(alone, 1)
    assert quantize(plain, 1).rotation is None


EACH_KIND = pytest.mark.parametrize(
    "weight", [Int(3, 32), MXInt(3, 32, levels="mid-rise"), Trellis(2, state_bits=12)], ids=lambda weight: weight.kind
)


@EACH_KIND
def test_feedback_on_what_the_low_rank_part_leaves_lowers_the_error_of_every_kind_of_code(weight):
    plan = LinearPlan(Caldera(), weight, rank=8, factor=MXInt(8, 8), rounding=Ldlq(), iterations=3)
    errors = {
        fraction: relative_error(quantize(replace(plan, method=Caldera(down_date=fraction)))) for fraction in (0, 1)
    }
    assert errors[1] < 0.98 * errors[0]
    assert errors[1] < 0.98 * relative_error(quantize(replace(plan, method=QeraExact(), iterations=1)))


@EACH_KIND
def test_factors_of_four_bits_at_twice_the_rank_leave_less_than_eight_bits(weight):
    """After one rounding, fitted as they are stored, with feedback in A; no more bits."""
    method = Caldera(starts_with="round")
    wide = LinearPlan(method, weight, rank=8, factor=MXInt(8, 8), rounding=Ldlq(), iterations=1)
    narrow = replace(wide, rank=16, factor=MXInt(4, 16))
    eight, four = quantize(wide), quantize(narrow)
    assert four.low_rank.bits <= eight.low_rank.bits
    assert relative_error(four) < 0.95 * relative_error(eight)
    assert relative_error(four) < relative_error(quantize(replace(narrow, method=QeraExact())))


def test_a_hessian_that_needs_more_damping_is_counted(plan):
    weight_OI, _ = layer(0)
    x_TI = torch.randn(20, IN, generator=torch.Generator().manual_seed(0))
    singular = {"hessian": x_TI.T @ x_TI / 20}
    found = replace(plan, iterations=2, method=Caldera(damping=0.0)).quantize(weight_OI, singular)
    assert found.damping_raises > 0
    assert found.effective_weight().isfinite().all()
    assert quantize(plan).damping_raises == 0


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"lplr_iterations": 0}, "lplr_iterations 0 is not an integer of at least 1"),
        ({"down_date": 1.5}, r"down_date 1.5 is not in 0\.\.1"),
        ({"damping": -1.0}, "damping -1.0 is not a number of at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        Caldera(**settings)
