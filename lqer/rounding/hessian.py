"""The matrix that error feedback runs on: H = E[x xᵀ], normalised, damped and factored.

The iterations of an alternating method share one factorization.

Shapes: I in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lqer.formats import NonFiniteError

DAMPING = 0.01
RAISE = 10.0  # the factor on damping after a failed factorization
FIRST_DAMPING = 1e-6  # after a failed factorization without damping
LARGEST_DAMPING = 1e6  # times the mean diagonal; a matrix that needs more is not a Hessian


class HessianError(ValueError):
    """The given matrix is not a valid Hessian (not positive semi-definite even after maximum damping)."""


@dataclass(frozen=True, eq=False)
class DampedHessian:
    """H / mean(diag H) + damping, and its lower Cholesky factor; float64 (I, I).

    dead_I: bool, inputs that were always zero, H_ii = 0; their diagonal is 1 + damping. damping: as asked for or as
    raised. raises: how often damping was multiplied by 10 because the factorization failed.
    """

    hessian_II: Tensor
    cholesky_II: Tensor
    dead_I: Tensor
    damping: float
    raises: int


def damp(hessian_II: Tensor, damping: float = DAMPING) -> DampedHessian:
    """Normalise, damp and factor E[x xᵀ], given up to scale in float32 or float64.

    damping is relative to the mean diagonal. Raises NonFiniteError for NaN or infinity, HessianError for a negative
    diagonal or a matrix that no damping makes positive definite, ValueError for one that is not square.
    """
    if hessian_II.dim() != 2 or hessian_II.shape[0] != hessian_II.shape[1]:
        raise ValueError(f"a hessian is square, found shape {tuple(hessian_II.shape)}")
    if damping < 0:
        raise ValueError(f"damping {damping!r} is negative")
    hessian_II = hessian_II.to(torch.float64)
    diagonal_I = hessian_II.diagonal()
    if not hessian_II.isfinite().all():
        raise NonFiniteError(f"the hessian holds {int((~hessian_II.isfinite()).sum())} values that are not finite")
    if (diagonal_I < 0).any():
        raise HessianError(f"the hessian has the negative diagonal entry {float(diagonal_I.min()):g}")
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean() if not dead_I.all() else torch.ones((), dtype=torch.float64)
    normal_II = hessian_II / mean + torch.diag(dead_I.to(torch.float64))
    raises = 0
    while True:
        damped_II = normal_II + damping * torch.eye(len(dead_I), dtype=torch.float64, device=hessian_II.device)
        cholesky_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            return DampedHessian(damped_II, cholesky_II, dead_I, damping, raises)
        damping = max(RAISE * damping, FIRST_DAMPING)
        raises += 1
        if damping > LARGEST_DAMPING:
            raise HessianError(
                f"the hessian is not positive definite with {LARGEST_DAMPING:g} of its mean diagonal added"
            )


def down_date(damped: DampedHessian, a_IR: Tensor, fraction: float = 1.0) -> DampedHessian:
    """H without the directions that a low-rank branch x·A can still correct, damped again (CALDERA, arXiv 2405.18886).

    With H = M Mᵀ and P an orthonormal basis of the columns of Mᵀ A, H' = M (1 − fraction · P Pᵀ) Mᵀ. At a fraction of 1
    errors of a weight in the row space of Aᵀ cost nothing, because the next reconstruction absorbs them; below 1 they
    keep a cost for the part that rounding A and B brings back. a_IR: any float dtype, finite.
    """
    directions_IR, _ = torch.linalg.qr(damped.cholesky_II.T @ a_IR.to(damped.cholesky_II))
    taken_IR = damped.cholesky_II @ directions_IR
    left_II = damped.hessian_II - fraction * taken_IR @ taken_IR.T
    # Where A absorbs everything, the rest is floating-point noise of either sign.
    left_II.diagonal().clamp_(min=torch.finfo(torch.float64).eps)
    return replace(damp((left_II + left_II.T) / 2, damped.damping), dead_I=damped.dead_I)


def as_damped(hessian: Tensor | DampedHessian, damping: float) -> DampedHessian:
    """The Hessian damped by `damping`; a DampedHessian is returned as it is."""
    return hessian if isinstance(hessian, DampedHessian) else damp(hessian, damping)
