"""The best rank-r approximation of an error under a metric: min over A·B of ‖ Cᵀ(Eᵀ − A·B) ‖_F with C·Cᵀ = H.

Two solvers: "exact", eigenvectors of the smaller Gram matrix in float64, and "krylov", matrix products in float32,
which costs a small fraction of it on large matrices and estimates its distance from the optimum. "auto" uses krylov
where it is faster: on a GPU also for small ones, since eigenvectors are found there step by step.

Shapes: I in_features, O out_features, R rank, K = min(I, O).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from lqer.lowrank.exact import solve_exact
from lqer.lowrank.krylov import largest_space, solve_krylov
from lqer.lowrank.metric import Metric

Solver = Literal["auto", "exact", "krylov"]

# Up to this smaller side the exact solution takes well under a second on a CPU.
SMALL_SIDE = 1024


@dataclass(frozen=True)
class Factors:
    """a_IR and b_RO, float32, with Eᵀ ≈ a_IR · b_RO.

    singular_values: float64, of the weighted error, descending: all K of them ("exact") or the R captured ("krylov").
    gap: the estimated fraction of energy that the optimum captures in addition; None for the optimum itself.
    """

    a_IR: Tensor
    b_RO: Tensor
    singular_values: Tensor
    gap: float | None
    _measure_energy: Callable[[], float]

    @cached_property
    def energy(self) -> float:
        """tr(E H Eᵀ); computed on demand, because under a full H it costs more than "krylov" itself."""
        return self._measure_energy()

    @property
    def captured_energy(self) -> float:
        """The fraction of the error's energy that A·B captures (1 where there is no error)."""
        captured = float(self.singular_values[: self.a_IR.shape[1]].square().sum())
        return min(captured / self.energy, 1.0) if self.energy > 0 else 1.0


def uses_krylov(solver: Solver, shorter: int, rank: int, device: torch.device) -> bool:
    """Whether a matrix with that shorter side is solved by "krylov"."""
    if solver == "auto":
        # A space larger than half the shorter side saves nothing.
        return (device.type == "cuda" or shorter > SMALL_SIDE) and 2 * largest_space(rank) <= shorter
    return solver == "krylov" and largest_space(rank) <= shorter


def reconstruct(error_OI: Tensor, metric: Metric, rank: int, solver: Solver = "exact", seed: int = 0) -> Factors:
    """Minimise tr((E − (A·B)ᵀ) H (E − (A·B)ᵀ)ᵀ) over products A·B of rank `rank`.

    error_OI: float32, W − W_q. A rank above K is treated as K, where the product is exact. seed: of the random start of
    "krylov"; where K is too small for its space, "exact" is used instead. Returns Factors with R = min(rank, K).
    """
    shorter = min(error_OI.shape)
    rank = min(rank, shorter)
    if uses_krylov(solver, shorter, rank, error_OI.device):
        found = solve_krylov(error_OI, metric, rank, seed)
        return Factors(found.a_IR, found.b_RO, found.singular_values_R, found.gap, partial(metric.energy, error_OI))
    a_IR, b_RO, sigma_K = solve_exact(error_OI, metric, rank)
    return Factors(a_IR.to(torch.float32), b_RO.to(torch.float32), sigma_K, None, lambda: float(sigma_K.square().sum()))
