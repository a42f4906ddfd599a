"""The triangular factor of the inverse Hessian that error feedback uses (GPTQ, arXiv 2210.17323).

Shapes: I in_features, V blocks, D columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.rounding.hessian import DampedHessian


def inverse_factor(damped: DampedHessian, order_I: Tensor | None = None) -> Tensor:
    """Upper triangular U, float64 (I, I), with Uᵀ U = H⁻¹.

    order_I: int64, a permutation of rows and columns that is applied to H first.
    """
    hessian_II = damped.hessian_II
    if order_I is not None:
        hessian_II = hessian_II[order_I][:, order_I]
    # H = M Mᵀ with M upper triangular, from the Cholesky factor of H in reverse order; then H⁻¹ = M⁻ᵀ M⁻¹.
    upper_II = torch.linalg.cholesky(hessian_II.flip(0, 1)).flip(0, 1)
    identity_II = torch.eye(len(upper_II), dtype=upper_II.dtype, device=upper_II.device)
    return torch.linalg.solve_triangular(upper_II, identity_II, upper=True)


def block_feedback(factor_II: Tensor, dimension: int) -> Tensor:
    """Rows U_PP⁻¹ U_P of each block P of `dimension` columns: the feedback of an error in P to the columns after it."""
    blocks = len(factor_II) // dimension
    rows_VDI = factor_II.unflatten(0, (blocks, dimension))
    on_diagonal_VDD = rows_VDI.unflatten(2, (blocks, dimension)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.linalg.solve_triangular(on_diagonal_VDD, rows_VDI, upper=True).flatten(0, 1)
