"""Methods: the plan of one linear, and the steps that turn its weight into a `QuantizedWeight` (result.py).

Every method alternates two steps on W ≈ W_q + (A·B)ᵀ, starting from W_q = 0 and A·B = 0:

    round          W_q = round(W − (A·B)ᵀ)                       by the plan's rounding, in its number format
    reconstruct    A·B = argmin_{rank r} tr(F H Fᵀ), F = W − W_q − (A·B)ᵀ;  A, B = round(A), round(B)

Methods differ in the metric H, in which step comes first, and in how often the steps are repeated; each is a subclass
of `Method` in a file of its own that states these. If the plan has an asymmetric target (lqer/methods/asymmetric.py),
W is that target. Each step sees what the other one stores. Where the plan has a rotation, W and H are those of the
rotated linear, and so are W_q, A and B. A method never sees a path, a configuration, a device map or another layer.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lqer.components import ADDED, Component
from lqer.formats import NumberFormat, Passthrough, QuantizedTensor
from lqer.formats.base import check_finite
from lqer.lowrank.metric import Metric
from lqer.lowrank.solver import Solver, reconstruct
from lqer.methods.asymmetric import asymmetric_target
from lqer.methods.inputs import InputRounding
from lqer.methods.result import LowRank, QuantizedWeight
from lqer.rounding import Nearest, Rounding
from lqer.statistics import Hessian, Mismatch, Statistic
from lqer.statistics.site import SiteStatistics, derive
from lqer.transforms import LinearTransform, Rotation
from lqer.transforms.base import rotation_on

# The statistics of one input site, by kind.
Statistics = Mapping[str, Tensor]
FactorAxis = Literal["reduction", "lqer", "outer"]
FACTOR_AXES: dict[FactorAxis, tuple[int, int]] = {"reduction": (0, 0), "lqer": (1, 1), "outer": (0, 1)}
# Where [quantize.low_rank] names no format, A and B are stored in half precision.
DEFAULT_FACTOR = Passthrough(dtype="float16")
NO_FACTORS: dict[str, Any] = {
    "factor": DEFAULT_FACTOR, "factor_b": None, "factor_axis": "reduction", "solver": "auto", "iterations": 1,
}  # fmt: skip


@dataclass(frozen=True)
class LinearPlan:
    """How one linear is quantized; None stands for "stays in the model's dtype".

    rank: capped at min(out_features, in_features); None until a budget of bits is allocated
    (lqer/stages/allocate_ranks.py). factor: the format of A, and of B unless factor_b is another. factor_axis: the axis
    of their blocks: "reduction", the summed dimension of each product (A along in_features, B along the rank); "lqer",
    as in the sweeps of LQER's paper (A along the rank, B along out_features); "outer", never the rank (A along
    in_features, B along out_features).
    """

    method: Method
    weight: NumberFormat
    activation: NumberFormat | None = None
    bias: NumberFormat | None = None
    rank: int | None = 0
    factor: NumberFormat = DEFAULT_FACTOR
    factor_axis: FactorAxis = "reduction"
    rounding: Rounding = field(default_factory=Nearest)
    transform: LinearTransform | None = None
    solver: Solver = "auto"
    iterations: int = 1
    seed: int = 0
    factor_b: NumberFormat | None = None
    # α of the target: how much of the error of the quantized model's inputs the weight makes up for.
    asymmetric: float = field(default=0.0, metadata=ADDED)

    def quantize(self, weight_OI: Tensor, statistics: Statistics) -> QuantizedWeight:
        """`Method.quantize_linear` of this plan."""
        return self.method.quantize_linear(weight_OI, statistics, self)

    def quantize_together(self, weights: Sequence[Tensor], statistics: Sequence[Statistics]) -> list[QuantizedWeight]:
        """`Method.quantize_together` of this plan."""
        return self.method.quantize_together(weights, statistics, self)

    @property
    def input_rounding(self) -> InputRounding | None:
        """How the quantized linear rounds its inputs; None where it does not."""
        return None if self.activation is None else InputRounding(self.activation, self.transform, self.seed)

    @property
    def hessian_bytes(self) -> int:
        """`Method.hessian_bytes`, and the Hessian of rotated inputs in float64."""
        return self.method.hessian_bytes + (0 if self.transform is None else 8)

    def without_low_rank(self) -> LinearPlan:
        """The same formats and rounding without reconstruction; plans that differ by A and B alone become equal."""
        return replace(self, method=RoundingOnly(), rank=0, **NO_FACTORS)

    def without_factors(self) -> LinearPlan:
        """The plan with only the fields that determine the rounding of W and the metric of its error."""
        return replace(self, rank=None, activation=None, bias=None, **NO_FACTORS)

    @property
    def factor_axes(self) -> tuple[int, int]:
        """The block axes of a_IR and b_RO."""
        return FACTOR_AXES[self.factor_axis]

    @property
    def factor_formats(self) -> tuple[NumberFormat, NumberFormat]:
        """The number formats of a_IR and b_RO."""
        return self.factor, self.factor_b or self.factor


# The plans of a model's linears, by full name; None for one that is skipped.
Plans = Mapping[str, LinearPlan | None]


@dataclass(frozen=True)
class Target:
    """The input of a method: a float32 weight and the statistics of its inputs, both rotated by `rotation`, if any."""

    weight_OI: Tensor
    statistics: Statistics
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Method(Component, family="method"):
    """How one method combines rounding and reconstruction. Its fields are its settings.

    statistics: the statistics of the inputs that `metric` reads. rounds_first: whether W is rounded before A·B is
    fitted to the error; otherwise A·B approximates W and the residual is rounded. iterations: how often both steps are
    repeated. propagate_error: whether a block is quantized on the outputs of the quantized blocks before it instead of
    the original model's activations; the latter allow chunks. A configuration can override both. rounding: the
    method's own, with its default settings; None if any rounding can be used. reconstructs: whether there are low-rank
    factors at all. hessian_bytes: per entry of the Hessian, next to the statistic, held while it is factored; by
    default one float64 matrix and the float32 one that is kept.
    """

    statistics: ClassVar[frozenset[Statistic]] = frozenset()
    rounds_first: ClassVar[bool] = True
    iterations: ClassVar[int] = 1
    propagate_error: ClassVar[bool] = False
    rounding: ClassVar[Rounding | None] = None
    reconstructs: ClassVar[bool] = True
    hessian_bytes: ClassVar[int] = 8 + 4

    def metric(self, weight_OI: Tensor, statistics: Statistics) -> Metric:
        """The metric under which A·B is fitted: the Frobenius norm by default."""
        return Metric()

    def unsupported_reason(self, rounding: Rounding) -> str | None:
        """Why the method does not support this rounding, as a rule to show to a user; None if it does."""
        return None

    def rounds_the_weight_itself(self, plan: LinearPlan) -> bool:
        """Whether W_q is round(W), not round(W − (A·B)ᵀ)."""
        return self.rounds_first and plan.iterations == 1

    def statistics_for(self, plan: LinearPlan) -> frozenset[Statistic]:
        """The statistics to gather for a plan of this method."""
        needed = self._needed(plan)
        return needed if plan.transform is None else plan.transform.statistics(needed)

    def _needed(self, plan: LinearPlan) -> frozenset[Statistic]:
        """The statistics that target, rounding and reconstruction read; factors of rank 0 need none."""
        of_target = frozenset({Hessian(), Mismatch()} if plan.asymmetric else ())
        return of_target | plan.rounding.statistics | (frozenset() if plan.rank == 0 else self.statistics)

    def target(self, weight_OI: Tensor, statistics: Statistics, plan: LinearPlan) -> Target:
        """The weight to approximate and its statistics, both rotated where the plan has a rotation.

        weight_OI: of any float dtype. Where the plan is asymmetric, its target W* takes the weight's place.
        """
        (found,) = self.targets([weight_OI], [statistics], plan)
        return found

    def targets(self, weights: Sequence[Tensor], statistics: Sequence[Statistics], plan: LinearPlan) -> list[Target]:
        """`target` of several weights of one shape, each with its own statistics."""
        weights, rotation = [weight_OI.to(torch.float32) for weight_OI in weights], None
        if plan.transform is not None or plan.asymmetric:
            # Check first: a rotation or a product would spread one NaN over the whole row.
            check_finite(*weights)
        if plan.transform is not None:
            (out_features, in_features), device = weights[0].shape, weights[0].device
            rotation = rotation_on(plan.transform, out_features, in_features, plan.seed, device)
            weights = [rotation.weight(weight_OI) for weight_OI in weights]
            of_inputs = rotation_on(plan.transform, 1, in_features, plan.seed, device)
            statistics = [derive(of_one, _rotated, of_inputs, self._needed(plan)) for of_one in statistics]
        found = [Target(weight_OI, of_one, rotation) for weight_OI, of_one in zip(weights, statistics, strict=True)]
        return found if not plan.asymmetric else [_asymmetric(target, plan.asymmetric) for target in found]

    def quantize_linear(self, weight_OI: Tensor, statistics: Statistics, plan: LinearPlan) -> QuantizedWeight:
        """Round a weight and, at a rank above 0, fit low-rank factors to the error.

        weight_OI: any float dtype, computed on in float32. statistics: what `statistics_for(plan)` names. Raises
        NonFiniteError if the weight holds NaN or infinities.
        """
        target = self.target(weight_OI, statistics, plan)
        return replace(self.decompose(target.weight_OI, target.statistics, plan), rotation=target.rotation)

    def takes_several(self, plan: LinearPlan) -> bool:
        """Whether `quantize_together` serves the plan: W_q is round(W); an alternation is one weight's own."""
        return type(self).decompose is Method.decompose and self.rounds_the_weight_itself(plan)

    def quantize_together(
        self, weights: Sequence[Tensor], statistics: Sequence[Statistics], plan: LinearPlan
    ) -> list[QuantizedWeight]:
        """`quantize_linear` of several weights of one shape, each under its own statistics.

        Equal up to floating-point error. Only for a plan that it `takes_several` of.
        """
        targets = self.targets(weights, statistics, plan)
        weights, statistics = [one.weight_OI for one in targets], [one.statistics for one in targets]
        rounded = plan.rounding.round_together(weights, statistics, plan.weight)
        return [
            QuantizedWeight(
                rounded_OI, self._low_rank(target.weight_OI, rounded_OI, target.statistics, plan), target.rotation
            )
            for target, rounded_OI in zip(targets, rounded, strict=True)
        ]

    def decompose(self, weight_OI: Tensor, statistics: Statistics, plan: LinearPlan) -> QuantizedWeight:
        """The method's steps, on a float32 weight and statistics that are rotated already."""
        if not plan.rank or not self.reconstructs:
            return QuantizedWeight(plan.rounding.round(weight_OI, statistics, plan.weight), None)
        metric = self.metric(weight_OI, statistics)
        low_rank = None if self.rounds_first else reconstruct_rounded(weight_OI, metric, plan)
        for iteration in range(plan.iterations):
            target_OI = weight_OI if low_rank is None else weight_OI - low_rank.product()
            rounded_OI = plan.rounding.round(target_OI, statistics, plan.weight)
            if self.rounds_first or iteration + 1 < plan.iterations:
                low_rank = reconstruct_rounded(weight_OI - rounded_OI.dequantize(), metric, plan)
        return QuantizedWeight(rounded_OI, low_rank)

    def reconstruct_error(
        self, weight_OI: Tensor, rounded_OI: QuantizedTensor, statistics: Statistics, plan: LinearPlan
    ) -> QuantizedWeight:
        """`quantize_linear` of a weight that has been rounded already, together with the others of its block."""
        assert plan.transform is None, "weights that are rounded together are not rotated"
        assert not plan.asymmetric, "weights that are rounded together have the block's output as target"
        return QuantizedWeight(rounded_OI, self._low_rank(weight_OI, rounded_OI, statistics, plan))

    def _low_rank(
        self, weight_OI: Tensor, rounded_OI: QuantizedTensor, statistics: Statistics, plan: LinearPlan
    ) -> LowRank | None:
        if not plan.rank or not self.reconstructs:
            return None
        error_OI = weight_OI.to(torch.float32) - rounded_OI.dequantize()
        return reconstruct_rounded(error_OI, self.metric(weight_OI, statistics), plan)


def _rotated(statistics: Statistics, rotation: Rotation, needed: frozenset[Statistic]) -> SiteStatistics:
    """The statistics of rotated inputs; their rotation does not depend on the linear's outputs."""
    return SiteStatistics(rotation.statistics(statistics, needed))


def _asymmetric(target: Target, strength: float) -> Target:
    moments = target.statistics["hessian"], target.statistics["mismatch"]
    return replace(target, weight_OI=asymmetric_target(target.weight_OI, *moments, strength))


class RoundingOnly(Method):
    """No low-rank factors: the weight is rounded, by any rounding."""

    kind = "none"
    reconstructs = False


def reconstruct_rounded(target_OI: Tensor, metric: Metric, plan: LinearPlan) -> LowRank:
    """The best A·B of the plan's rank under the metric, then A and B in their number format."""
    assert plan.rank, "a budget is allocated before anything is quantized"
    factors = reconstruct(target_OI, metric, plan.rank, plan.solver, plan.seed)
    (a_format, b_format), (a_axis, b_axis) = plan.factor_formats, plan.factor_axes
    return LowRank(
        a_format.quantize(factors.a_IR, axis=a_axis),
        b_format.quantize(factors.b_RO, axis=b_axis),
        factors.captured_energy,
        factors.gap,
    )
