"""Settings of the methods that have some of their own, as a configuration gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lqer.rounding.base import require_damping
from lqer.rounding.hessian import DAMPING

# The published experiments take 50, of which the first few do nearly all (docs/methods/caldera.md).
LPLR_ITERATIONS = 10

Step = Literal["reconstruct", "round"]


@dataclass(frozen=True)
class CalderaSettings:
    """`[quantize.caldera]`; see lqer/methods/caldera.py.

    starts_with: which step comes first. lplr_iterations: turns of least squares where A or B is rounded. down_date:
    the share of H that error feedback leaves out where the low-rank part can mend: 1 as published, 0 for none, between
    them where A and B are coarse. damping: of R = E[x xᵀ] in both steps, as a share of its mean diagonal.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    starts_with: Step = "reconstruct"
    lplr_iterations: int = LPLR_ITERATIONS
    down_date: float = 1.0
    damping: float = DAMPING

    def __post_init__(self) -> None:
        require_damping(self.damping, "caldera")
        if not 0 <= self.down_date <= 1:
            raise ValueError(f"down_date {self.down_date} is not in 0..1 (caldera)")
        if self.lplr_iterations < 1:
            raise ValueError(f"lplr_iterations {self.lplr_iterations} is not at least 1 (caldera)")
