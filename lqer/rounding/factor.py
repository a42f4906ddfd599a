"""The triangular factor of a damped inverse Hessian, along which error feedback walks (GPTQ, arXiv 2210.17323).

Shapes: I in_features, D columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_DAMPING = 0.01
# Rounding can leave a singular Hessian a little indefinite, so that the damping asked for does not suffice.
DAMPING_RAISE = 10.0
MAX_RAISES = 6


def inverse_factor(hessian_II: Tensor, damping: float = DEFAULT_DAMPING) -> Tensor:
    """Upper triangular U, float64 [I, I], with U^T U the inverse of H / mean(diag H) + damping * identity.

    hessian_II: symmetric positive semi-definite, float32 or float64; zeros give the identity's factor. Damping that
    does not make H positive definite is raised tenfold, up to six times. Raises ValueError for a Hessian with NaN or
    infinity, or one that is not positive definite even then.
    """
    if not torch.isfinite(hessian_II).all():
        raise ValueError("the Hessian holds NaN or infinity")
    hessian_II = hessian_II.to(torch.float64)
    mean = hessian_II.diagonal().mean()
    identity_II = torch.eye(len(hessian_II), dtype=torch.float64, device=hessian_II.device)
    hessian_II = hessian_II / mean if mean > 0 else identity_II
    for raises in range(MAX_RAISES + 1):
        damped_II = hessian_II + damping * DAMPING_RAISE**raises * identity_II
        # H = M M^T with M upper triangular, from a Cholesky factor of H read backwards; then H^-1 = M^-T M^-1.
        lower_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
    raise ValueError(f"the Hessian is not positive definite with a damping of {damping * DAMPING_RAISE**MAX_RAISES:g}")


def block_feedback(factor_II: Tensor, dimension: int) -> Tensor:
    """Rows U_PP^-1 U_P of each block P of `dimension` columns: what an error in P adds to the columns behind it."""
    blocks = len(factor_II) // dimension
    rows_VDI = factor_II.unflatten(0, (blocks, dimension))
    on_diagonal_VDD = rows_VDI.unflatten(2, (blocks, dimension)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.linalg.solve_triangular(on_diagonal_VDD, rows_VDI, upper=True).flatten(0, 1)
