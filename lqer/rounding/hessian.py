"""The matrix that error feedback runs on: H = E[x xᵀ], normalised, damped and factored.

Linears that share their inputs, and the iterations of an alternating method, share one `DampedHessian`: each of its
factors is made once. A float64 matrix of a down_proj may take 23 GB: H itself is made from the statistic, panel by
panel, in the memory in which it is then factored, and nothing but its Cholesky factor is kept in float64.

Shapes: I in_features, R rank, P rows of a panel.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lqer.formats import NonFiniteError
from lqer.statistics.site import Source, derive
from lqer.statistics.symmetric import panels, symmetrize_

DAMPING = 0.01
RAISE = 10.0  # the factor on damping after a failed factorization
FIRST_DAMPING = 1e-6  # after a failed factorization without damping
LARGEST_DAMPING = 1e6  # times the mean diagonal; a matrix that needs more is not a Hessian


class HessianError(ValueError):
    """The given matrix is not a valid Hessian (not positive semi-definite even after maximum damping)."""


class DampedHessian(Source):
    """H / mean(diag H) + damping, float64 (I, I), and what is derived from it.

    given_II: E[x xᵀ] up to scale, float32 or float64, symmetric to the last bit. damping: relative to the mean
    diagonal. Where H is not positive definite, the first factorization multiplies it by 10 until it is.
    mean: the mean diagonal of inputs that were not always zero, float64. dead_I: bool, those that were, H_ii = 0; their
    diagonal becomes 1 + damping.

    Raises NonFiniteError for NaN or infinity, HessianError for a negative diagonal, ValueError for a matrix that is not
    square; a factorization raises HessianError where no damping makes H positive definite.
    """

    def __init__(self, given_II: Tensor, damping: float = DAMPING, dead_I: Tensor | None = None):
        super().__init__()
        if given_II.dim() != 2 or given_II.shape[0] != given_II.shape[1]:
            raise ValueError(f"a hessian is square, found shape {tuple(given_II.shape)}")
        if damping < 0:
            raise ValueError(f"damping {damping!r} is negative")
        diagonal_I = given_II.diagonal().to(torch.float64)
        # Read together: each read waits for a GPU.
        infinite, least = torch.stack((_infinite(given_II), diagonal_I.min())).tolist()
        if infinite:
            raise NonFiniteError(f"the hessian holds {int(infinite)} values that are not finite")
        if least < 0:
            raise HessianError(f"the hessian has the negative diagonal entry {least:g}")
        zero_I = diagonal_I == 0
        alive = (~zero_I).sum()
        self.mean = torch.where(alive > 0, diagonal_I.sum() / alive, 1.0)
        self.dead_I = zero_I if dead_I is None else dead_I
        self._zero_I = zero_I.to(torch.float64)
        self._given_II = given_II
        self._damping, self._raises, self._is_factored = damping, 0, False

    @property
    def damping(self) -> float:
        """The damping that was asked for, or to which it was raised."""
        self._require_factor()
        return self._damping

    @property
    def raises(self) -> int:
        """How often damping was multiplied by 10."""
        self._require_factor()
        return self._raises

    @property
    def diagonal_I(self) -> Tensor:
        """The diagonal of H, float64."""
        return self._given_II.diagonal().to(torch.float64) / self.mean + self._zero_I + self._damping

    @property
    def hessian_II(self) -> Tensor:
        """H, float64, made anew."""
        return self.matrix(torch.float64)

    @cached_property
    def cholesky_II(self) -> Tensor:
        """The lower Cholesky factor of H, float64, in column-major memory."""
        return self.factor()

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """H, computed in float64, in that dtype."""
        self._require_factor()
        matrix_II = torch.empty_like(self._given_II, dtype=dtype, memory_format=torch.contiguous_format)
        for rows in panels(len(matrix_II)):
            matrix_II[rows] = self._given_II[rows].to(torch.float64) / self.mean
        matrix_II.diagonal().copy_(self.diagonal_I)
        return matrix_II

    def factor(self, order_I: Tensor | None = None) -> Tensor:
        """The lower Cholesky factor of H with its rows and columns in an order (int64), float64, column-major."""
        while True:
            # Symmetric: what is written row by row is read column by column, as the factorization in place needs it.
            rows_II = torch.empty_like(self._given_II, dtype=torch.float64, memory_format=torch.contiguous_format)
            for rows in panels(len(rows_II)):
                given_PI = self._given_II[rows] if order_I is None else self._given_II[order_I[rows]][:, order_I]
                torch.div(given_PI.to(torch.float64), self.mean, out=rows_II[rows])
            rows_II.diagonal().copy_(self.diagonal_I if order_I is None else self.diagonal_I[order_I])
            in_place_II, failed = rows_II.mT, torch.empty((), dtype=torch.int32, device=rows_II.device)
            factor_II, failed = torch.linalg.cholesky_ex(in_place_II, out=(in_place_II, failed))
            if not failed:
                self._is_factored = True
                return factor_II
            del rows_II, in_place_II, factor_II
            self._raise_damping()

    def _raise_damping(self) -> None:
        self._damping = max(RAISE * self._damping, FIRST_DAMPING)
        self._raises += 1
        if self._damping > LARGEST_DAMPING:
            raise HessianError(
                f"the hessian is not positive definite with {LARGEST_DAMPING:g} of its mean diagonal added"
            )

    def _require_factor(self) -> None:
        """Factor H unless that has been done: the damping is known only after a factorization."""
        if not self._is_factored:
            _ = self.cholesky_II


def _infinite(x_II: Tensor) -> Tensor:
    """How many values are not finite, float64."""
    counts = [(~x_II[rows].isfinite()).sum() for rows in panels(len(x_II))]
    return torch.stack(counts).sum().to(torch.float64)


def damp(hessian_II: Tensor, damping: float = DAMPING) -> DampedHessian:
    """A DampedHessian with its Cholesky factor, so that every error of the matrix is raised here."""
    damped = DampedHessian(hessian_II, damping)
    _ = damped.cholesky_II
    return damped


def damped_hessian(statistics: Mapping[str, Any], damping: float) -> DampedHessian:
    """statistics["hessian"] damped, once for all linears of a site; a DampedHessian is returned as it is."""
    hessian = statistics["hessian"]
    return hessian if isinstance(hessian, DampedHessian) else derive(statistics, _damped, damping)


def _damped(statistics: Mapping[str, Tensor], damping: float) -> DampedHessian:
    return DampedHessian(statistics["hessian"], damping)


def down_date(damped: DampedHessian, a_IR: Tensor, fraction: float = 1.0) -> DampedHessian:
    """H without the directions that a low-rank branch x·A can still correct, damped again (CALDERA, arXiv 2405.18886).

    With H = M Mᵀ and P an orthonormal basis of the columns of Mᵀ A, H' = M (1 − fraction · P Pᵀ) Mᵀ. At a fraction of 1
    errors of a weight in the row space of Aᵀ cost nothing, because the next reconstruction absorbs them; below 1 they
    keep a cost for the part that rounding A and B brings back. a_IR: any float dtype, finite.
    """
    directions_IR, _ = torch.linalg.qr(damped.cholesky_II.T @ a_IR.to(damped.cholesky_II))
    taken_IR = damped.cholesky_II @ directions_IR
    left_II = damped.hessian_II
    for rows in panels(len(left_II)):
        left_II[rows] -= (fraction * taken_IR[rows]) @ taken_IR.T
    # Where A absorbs everything, the rest is floating-point noise of either sign.
    left_II.diagonal().clamp_(min=torch.finfo(torch.float64).eps)
    left = DampedHessian(symmetrize_(left_II), damped.damping, damped.dead_I)
    _ = left.cholesky_II
    return left
