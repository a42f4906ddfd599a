"""What a rounding is: the choice of one of a number format's values for every weight.

A rounding is a pure function on tensors in a file of its own, and a frozen dataclass deriving from `Rounding` that
passes its settings and the statistics it needs to that function. The dataclass is what a configuration's
`quantize.rounding` names: `"nearest"`, or `{ kind = "nearest" }` with settings next to the kind.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lqer.components import Component
from lqer.formats import NumberFormat, QuantizedTensor
from lqer.rounding.hessian import DampedHessian
from lqer.statistics import Statistic

# The statistics of one input site, by kind. A method that has damped the Hessian already passes it on as it is.
Statistics = Mapping[str, Tensor | DampedHessian]


class Rounding(Component, ABC, family="rounding"):
    """Settings of one rounding."""

    # Whether all linears of a block are rounded together; `round` then only gives the start.
    together: ClassVar[bool] = False
    # Bytes per weight of a block that are held while it learns by gradients; 0 if it does not.
    learning_bytes: ClassVar[int] = 0

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The statistics of the inputs that `round` reads."""
        return frozenset()

    @property
    def keeps_scales(self) -> bool:
        """Whether it can round under scales that a transform has fixed."""
        return False

    @property
    def learning_batch(self) -> int:
        """Sequences that pass a block at once while it learns."""
        return 1

    @abstractmethod
    def round(self, weight_OI: Tensor, statistics: Statistics, number_format: NumberFormat) -> QuantizedTensor:
        """The weight in the format, with groups along in_features.

        weight_OI: float32. statistics: at least those that `self.statistics` names, by kind; "hessian" is E[x xᵀ] up to
        scale, float32 or float64, or a DampedHessian. Raises NonFiniteError if the weight holds NaN or infinities.
        """

    def round_together(
        self, weights: Sequence[Tensor], statistics: Sequence[Statistics], number_format: NumberFormat
    ) -> list[QuantizedTensor]:
        """`round` of several weights of one shape, each under its own statistics; equal up to floating-point error.

        One after the other by default; a rounding whose steps are too short to fill a GPU takes them for all at once.
        """
        pairs = zip(weights, statistics, strict=True)
        return [self.round(weight_OI, of_one, number_format) for weight_OI, of_one in pairs]

    def unsupported_reason(self, number_format: NumberFormat) -> str | None:
        """Why weights of that format cannot be rounded this way, as a rule to show to a user; None if they can."""
        return None


def require_damping(damping: Any, kind: str) -> None:
    """Raise ValueError unless `damping`, relative to the Hessian's mean diagonal, is a number of at least 0."""
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not damping >= 0:
        raise ValueError(f"damping {damping!r} is not a number of at least 0 ({kind})")


def unsupported_feedback(number_format: NumberFormat) -> str | None:
    """Why weights of that format cannot be rounded with error feedback; None if they can."""
    if number_format.kind == "codebook":
        return 'codebooks are learned while the columns are rounded: rounding "vector" does that'
    if number_format.kind == "passthrough":
        return "half-precision weights have no rounding error to compensate"
    return None
