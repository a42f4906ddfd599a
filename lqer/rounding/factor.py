"""The triangular factor of the inverse Hessian that error feedback uses (GPTQ, arXiv 2210.17323).

H with its columns in reverse order is L Lᵀ by Cholesky, so that H = M Mᵀ with the upper M, which is L in reverse order,
and H⁻¹ = Uᵀ U with U = M⁻¹. L is inverted in place, by halves.

Shapes: I in_features, V blocks, D columns of a block, P rows of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.rounding.hessian import DampedHessian
from lqer.statistics.symmetric import panels

# Up to this side a triangle is inverted by one solution, not by halves.
SMALL_TRIANGLE = 1024
# Right-hand sides that are solved for at once.
SOLVED_AT_ONCE = 4096


def inverse_factor(damped: DampedHessian, order_I: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Upper triangular U (I, I) with Uᵀ U = H⁻¹, computed in float64.

    order_I: int64, a permutation of rows and columns that is applied to H first.
    """
    size = len(damped.dead_I)
    order_I = torch.arange(size, device=damped.dead_I.device) if order_I is None else order_I
    reversed_II = _reversed_factor(damped, order_I)
    upper_II = torch.empty(size, size, dtype=dtype, device=reversed_II.device)
    for rows in panels(size):
        upper_II[rows] = _rows_of_factor(reversed_II, rows)
    return upper_II


def _reversed_factor(damped: DampedHessian, order_I: Tensor) -> Tensor:
    """U with its rows and columns in reverse order, L⁻¹, float64."""
    lower_II = damped.factor(order_I.flip(0))
    invert_lower_(lower_II)
    return lower_II


def _rows_of_factor(reversed_II: Tensor, rows: slice) -> Tensor:
    size = len(reversed_II)
    return reversed_II[size - rows.stop : size - rows.start].flip(0, 1)


def feedback_factor(damped: DampedHessian, by_diagonal: bool) -> tuple[Tensor, Tensor]:
    """U in float32, and the order of its columns: the largest H_ii first if `by_diagonal`, else as they are."""
    order_I = torch.arange(len(damped.dead_I), device=damped.dead_I.device)
    if by_diagonal:
        order_I = damped.diagonal_I.argsort(descending=True, stable=True)
    return inverse_factor(damped, order_I, torch.float32), order_I


def vector_feedback(damped: DampedHessian, dimension: int) -> tuple[Tensor, Tensor]:
    """Feedback of an error in a block of `dimension` columns to the columns after it, and the diagonal of U.

    Feedback is float32 (I, I): rows U_PP⁻¹ U_P of each block P. The diagonal is float64 (I,).
    """
    size = len(damped.dead_I)
    reversed_II = _reversed_factor(damped, torch.arange(size, device=damped.dead_I.device))
    feedback_II = torch.empty(size, size, dtype=torch.float32, device=reversed_II.device)
    for rows in panels(size):
        feedback_II[rows] = _feedback_rows(_rows_of_factor(reversed_II, rows), rows, dimension)
    return feedback_II, reversed_II.diagonal().flip(0).clone()


def invert_lower_(lower_II: Tensor) -> None:
    """The inverse of a lower triangular matrix in place: a third of the work of solving for all unit vectors.

    (A 0; B C)⁻¹ = (A⁻¹ 0; -C⁻¹ B A⁻¹ C⁻¹)
    """
    size = len(lower_II)
    if size <= SMALL_TRIANGLE:
        identity_II = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        lower_II.copy_(torch.linalg.solve_triangular(lower_II, identity_II, upper=False))
        return
    half = -(-size // (2 * SMALL_TRIANGLE)) * SMALL_TRIANGLE
    first, second = slice(0, half), slice(half, size)
    below = lower_II[second, first]
    # A solution needs a copy of the triangle and two of the right-hand side.
    for columns in panels(half, SOLVED_AT_ONCE):
        below[:, columns] = torch.linalg.solve_triangular(lower_II[second, second], below[:, columns], upper=False)
    for rows in panels(size - half, SOLVED_AT_ONCE):
        solved = torch.linalg.solve_triangular(lower_II[first, first], below[rows], upper=False, left=False)
        below[rows] = solved.neg_()
    invert_lower_(lower_II[first, first])
    invert_lower_(lower_II[second, second])


def _feedback_rows(factor_PI: Tensor, rows: slice, dimension: int) -> Tensor:
    """A panel is a whole number of blocks: vectors have 1, 2 or 4 columns."""
    blocks = len(factor_PI) // dimension
    rows_VDI = factor_PI.unflatten(0, (blocks, dimension))
    square_VDVD = rows_VDI[:, :, rows].unflatten(2, (blocks, dimension))
    on_diagonal_VDD = square_VDVD.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.linalg.solve_triangular(on_diagonal_VDD, rows_VDI, upper=True).flatten(0, 1)
