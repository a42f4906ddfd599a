"""The metric under which a low-rank reconstruction is optimal.

For inputs x with H = E[x xᵀ], an error E of a weight costs E‖E x‖² = tr(E H Eᵀ) at the layer's output (QERA, arXiv
2410.06040). LQER and QERA-approx use a diagonal H = S²; H = I is the Frobenius norm.

Shapes: I in_features, O out_features, L columns of any number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Eigenvalues of H below this fraction of the largest are noise of its float32 storage and accumulation.
RELATIVE_EIGENVALUE_NOISE = 1e-12


@dataclass(frozen=True)
class Metric:
    """H, symmetric positive semi-definite (I, I), in its cheapest form; with neither field the identity.

    scale_I: float32, positive, S of H = diag(S)². hessian_II: float32 or float64, H itself; it may be singular.
    """

    scale_I: Tensor | None = None
    hessian_II: Tensor | None = None

    def times(self, x_IL: Tensor) -> Tensor:
        """H·x in x's dtype."""
        if self.hessian_II is not None:
            return self.hessian_II.to(x_IL.dtype) @ x_IL
        if self.scale_I is not None:
            return x_IL * self.scale_I.to(x_IL.dtype).square()[:, None]
        return x_IL

    def root_times(self, x_IL: Tensor) -> Tensor:
        """Cᵀ·x for a C with C·Cᵀ = H, in float64."""
        x_IL = x_IL.to(torch.float64)
        if self.hessian_II is not None:
            roots_I, vectors_II = self._eigenvectors
            return roots_I[:, None] * (vectors_II.T @ x_IL)
        return x_IL if self.scale_I is None else x_IL * self.scale_I.to(torch.float64)[:, None]

    @cached_property
    def _eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Roots of the eigenvalues of H and its eigenvectors, float64; made once for all errors under this metric."""
        assert self.hessian_II is not None
        eigenvalues_I, vectors_II = torch.linalg.eigh(self.hessian_II.to(torch.float64))
        floor = RELATIVE_EIGENVALUE_NOISE * eigenvalues_I[-1].clamp(min=0)
        return torch.where(eigenvalues_I > floor, eigenvalues_I, 0.0).sqrt(), vectors_II

    def energy(self, error_OI: Tensor) -> float:
        """tr(E H Eᵀ) to float32's accuracy. A full H costs a product of H with the error."""
        if self.hessian_II is not None:
            return float((error_OI.T * self.times(error_OI.T)).sum(dtype=torch.float64))
        squares_I = error_OI.square().sum(0).to(torch.float64)
        return float((squares_I if self.scale_I is None else squares_I * self.scale_I.to(torch.float64).square()).sum())
