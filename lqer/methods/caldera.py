"""CALDERA (arXiv 2405.18886, algorithm 1): W ≈ W_q + (A·B)ᵀ, all three rounded, each fitted to the others' residual.

    H = E[x xᵀ] / mean diag E[x xᵀ] + damping;    W_q = A·B = 0
    repeat T times, in this order or the other one:
        reconstruct   A·B = argmin_{rank r} tr(F H Fᵀ),  F = W − W_q − (A·B)ᵀ;   by LPLR where A or B is rounded
        round         W_q = round(W − (A·B)ᵀ) with error feedback on H', H without the directions that A corrects
    return the state with W_q and A·B that has the least tr(F H Fᵀ)

Neither step is monotone, because rounding may undo the gain of least squares; only the best state so far is. In the
paper's letters L is Bᵀ and R is Aᵀ. Its randomized Hadamard transform is the plan's rotation, its LDLQ and its lattice
codebooks are the plan's rounding and formats.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lqer.components import require_choice, require_positive
from lqer.formats import NonFiniteError, NumberFormat, Passthrough, QuantizedTensor
from lqer.lowrank.lplr import lplr
from lqer.lowrank.metric import Metric
from lqer.lowrank.solver import reconstruct
from lqer.methods.base import LinearPlan, Statistics, reconstruct_rounded
from lqer.methods.qera import QeraExact
from lqer.methods.result import LowRank, QuantizedWeight
from lqer.rounding import Rounding
from lqer.rounding.base import require_damping, unsupported_feedback
from lqer.rounding.hessian import DAMPING, DampedHessian, damped_hessian, down_date
from lqer.rounding.ldlq import Ldlq, ldlq

# As in the published experiments.
ITERATIONS = 20
# The published experiments take 50, of which the first few do nearly all (docs/methods/caldera.md).
LPLR_ITERATIONS = 10


@dataclass(frozen=True)
class State:
    """W_q and A·B as they are stored; None where a step has not been taken yet."""

    rounded: QuantizedTensor | None = None
    low_rank: LowRank | None = None

    def without_rounded(self, weight_OI: Tensor) -> Tensor:
        """W − W_q."""
        return weight_OI if self.rounded is None else weight_OI - self.rounded.dequantize()

    def without_low_rank(self, weight_OI: Tensor) -> Tensor:
        """W − (A·B)ᵀ."""
        return weight_OI if self.low_rank is None else weight_OI - self.low_rank.product()


Step = Callable[[State], State]


def alternate(weight_OI: Tensor, metric: Metric, steps: Sequence[Step], iterations: int) -> tuple[State, list[float]]:
    """Take the steps in turn, `iterations` times.

    Returns the best of the states that have both parts, and after every step the relative error
    sqrt(tr(F H Fᵀ) / tr(W H Wᵀ)), 0 for a weight without energy. Raises NonFiniteError if no error is finite.
    """
    weight_energy = metric.energy(weight_OI)
    state, best, least = State(), State(), float("inf")
    errors: list[float] = []
    for _ in range(iterations):
        for step in steps:
            state = step(state)
            energy = max(metric.energy(state.without_rounded(state.without_low_rank(weight_OI))), 0.0)
            errors.append((energy / weight_energy) ** 0.5 if weight_energy > 0 else 0.0)
            if state.rounded is not None and state.low_rank is not None and errors[-1] < least:
                best, least = state, errors[-1]
    if best.rounded is None:
        raise NonFiniteError(f"none of {iterations} iterations ended with a finite error")
    return best, errors


@dataclass(frozen=True)
class Caldera(QeraExact):
    """CALDERA (arXiv 2405.18886): rounding and low-rank factors in turn, all three quantized.

    starts_with: which step comes first. lplr_iterations: alternating least-squares steps where A or B is rounded.
    down_date: the fraction of the directions that A corrects to remove from H for error feedback: 1 as published, 0 for
    none, in between for coarse A and B. damping: of H in both steps, as a fraction of its mean diagonal.
    """

    kind = "caldera"
    rounding = Ldlq()
    rounds_first = False
    iterations = ITERATIONS
    hessian_bytes = 3 * 8 + 2 * 4

    starts_with: Literal["reconstruct", "round"] = "reconstruct"
    lplr_iterations: int = LPLR_ITERATIONS
    down_date: float = 1.0
    damping: float = DAMPING

    def __post_init__(self) -> None:
        require_choice("starts_with", self.starts_with, ["reconstruct", "round"], self.kind)
        require_positive("lplr_iterations", self.lplr_iterations, self.kind)
        require_damping(self.damping, self.kind)
        if not 0 <= self.down_date <= 1:
            raise ValueError(f"down_date {self.down_date} is not in 0..1 ({self.kind})")

    def unsupported_reason(self, rounding: Rounding) -> str | None:
        if getattr(rounding, "damping", DAMPING) != DAMPING:
            return f'damping of the Hessian is set by quantize.method.damping under method "{self.kind}"'
        return None

    def decompose(self, weight_OI: Tensor, statistics: Statistics, plan: LinearPlan) -> QuantizedWeight:
        """Algorithm 1; without a rank, the rounding alone."""
        if not plan.rank:
            return super().decompose(weight_OI, statistics, plan)
        damped = damped_hessian(statistics, self.damping)
        metric = damped.derived(_metric)
        fit = _fit(damped, metric, plan, self.lplr_iterations)
        raises = [damped.raises]

        def take_reconstruct(state: State) -> State:
            return replace(state, low_rank=fit(state.without_rounded(weight_OI)))

        def take_round(state: State) -> State:
            hessian = damped
            if self.down_date and state.low_rank is not None:
                hessian = down_date(damped, state.low_rank.a_IR.dequantize(), self.down_date)
                raises.append(hessian.raises)
            target_OI = state.without_low_rank(weight_OI)
            rounded = plan.rounding.round(target_OI, {**statistics, "hessian": hessian}, plan.weight)
            return replace(state, rounded=rounded)

        steps = [take_reconstruct, take_round]
        steps = steps if self.starts_with == "reconstruct" else steps[::-1]
        best, errors = alternate(weight_OI, metric, steps, plan.iterations)
        assert best.rounded is not None
        return QuantizedWeight(best.rounded, best.low_rank, errors=tuple(errors), damping_raises=sum(raises))


def _metric(damped: DampedHessian) -> Metric:
    return Metric(hessian_II=damped.matrix(torch.float32))


def _fit(damped: DampedHessian, metric: Metric, plan: LinearPlan, lplr_iterations: int) -> Callable[[Tensor], LowRank]:
    """How A and B are fitted to a target: in closed form, or alternating where one of them is rounded to a few bits."""
    a_format, b_format = plan.factor_formats
    if isinstance(a_format, Passthrough) and isinstance(b_format, Passthrough):
        return partial(reconstruct_rounded, metric=metric, plan=plan)
    a_axis, b_axis = plan.factor_axes
    round_a, round_b = partial(a_format.quantize, axis=a_axis), partial(b_format.quantize, axis=b_axis)
    along_inputs = a_axis == 0 and unsupported_feedback(a_format) is None
    round_last_a = partial(_round_along_inputs, damped, a_format) if along_inputs else None

    def alternating(target_OI: Tensor) -> LowRank:
        assert plan.rank
        start = reconstruct(target_OI, metric, plan.rank, plan.solver, plan.seed)
        pair = lplr(target_OI, metric, start.a_IR, round_a, round_b, lplr_iterations, round_last_a)
        energy = pair.target_energy
        captured_energy = min(max(1 - pair.energy / energy, 0.0), 1.0) if energy > 0 else 1.0
        return LowRank(pair.a_IR, pair.b_RO, captured_energy, start.gap)

    return alternating


def _round_along_inputs(damped: DampedHessian, number_format: NumberFormat, a_IR: Tensor) -> QuantizedTensor:
    """A with error feedback from input to input, blocks along them."""
    rounded = ldlq(a_IR.T.contiguous(), damped, number_format)
    return QuantizedTensor(number_format, tuple(a_IR.shape), 0, rounded.parts)
