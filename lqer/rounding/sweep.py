"""The columns of a panel of GPTQ's sweep, or of coordinate descent, in one kernel, for values that are evenly spaced.

For columns p = 0 .. P - 1 of the panel, first to last (arXiv 2210.17323, algorithm 1):

    c_p = clamp(round(w_p / s_p) + z_p)        q_p = (c_p - z_p) s_p        or clamp(floor(w_p / s_p)) where z_p = -1/2
    e_p = (w_p - q_p) / U_pp
    w_j = w_j - U_pj e_p                       for all j > p of the panel

Of coordinate descent (rounding/descent.py), under fixed scales:

    c = clamp(round(c_p + g_p / (H_pp s_p)))    d = (c - c_p) s_p    if g_p d > H_pp d² / 2, else c = c_p and d = 0
    c_p = c,  e_p = e_p - d,  g_j = g_j - H_pj d                     for all j >= p of the panel

In PyTorch each column costs some twenty launches of a few microseconds; here a program keeps its rows of the panel in
registers and walks the columns. It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: E matrices, O out_features, N rows of all matrices, P columns of a panel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.formats.spacing import Spacing

# Rows of a program: one warp, whose registers hold 128 columns of them.
ROWS = 32
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)
LARGEST_ROUNDED = tl.constexpr(1048576.0)
# The step of MXINT's zero blocks is smaller: their codes are 0.
SMALLEST_STEP = tl.constexpr(2.0**-126)


def sweep_panel(
    weight_PEO: Tensor, upper_EPP: Tensor, spacing: Spacing, reference_PEO: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (P, N), int8 or uint8, and scaled errors (P, N), float32, of a panel; the weight is left as it is.

    weight_PEO: float32, columns of W, contiguous but for the stride of P. upper_EPP: float32, the panel's block on the
    diagonal of U. spacing: of every weight of the panel, (P, N) or broadcast to it by strides. reference_PEO: as
    weight_PEO, what errors are taken from (LDLQ's are those of the weight without feedback); None for w_p itself.
    """
    columns, matrices, rows = weight_PEO.shape
    step_PN, zero_PN = spacing.step_G, spacing.zero_G
    dtype = torch.int8 if spacing.min_code < 0 else torch.uint8
    codes_PN = torch.empty(columns, matrices * rows, dtype=dtype, device=weight_PEO.device)
    error_PN = torch.empty(columns, matrices * rows, dtype=torch.float32, device=weight_PEO.device)
    sweep_kernel[(triton.cdiv(rows, ROWS), matrices)](
        weight_PEO, reference_PEO, upper_EPP, step_PN, zero_PN, codes_PN, error_PN, columns, rows, matrices * rows,
        weight_PEO.stride(0), *upper_EPP.stride(), *step_PN.stride(), *zero_PN.stride(),
        spacing.min_code, spacing.max_code, WIDTH=triton.next_power_of_2(columns), ROWS_C=ROWS, num_warps=1,
    )  # fmt: skip
    return codes_PN, error_PN


@triton.jit
def sweep_kernel(
    weight, reference, upper, step, zero, codes, error, columns, rows, all_rows,
    weight_stride, upper_matrix_stride, upper_row_stride, upper_column_stride,
    step_column_stride, step_row_stride, zero_column_stride, zero_row_stride, min_code, max_code,
    WIDTH: tl.constexpr, ROWS_C: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1)
    o = tl.program_id(0) * ROWS_C + tl.arange(0, ROWS_C)
    p = tl.arange(0, WIDTH)
    inside = o < rows
    o += matrix * rows
    upper += matrix.to(tl.int64) * upper_matrix_stride
    present = (p < columns)[:, None] & inside[None, :]
    w_PO = tl.load(weight + p[:, None] * weight_stride + o[None, :], mask=present, other=0.0)
    for i in range(columns):
        w_O = tl.sum(tl.where((p == i)[:, None], w_PO, 0.0), axis=0)
        step_O = tl.load(step + i * step_column_stride + o * step_row_stride, mask=inside, other=1.0)
        zero_O = tl.load(zero + i * zero_column_stride + o * zero_row_stride, mask=inside, other=0.0)
        steps_O = tl.where(step_O < SMALLEST_STEP, 0.0, tl.math.div_rn(w_O, step_O))
        steps_O = tl.minimum(tl.maximum(steps_O, -LARGEST_ROUNDED), LARGEST_ROUNDED)
        whole_O = tl.ceil(zero_O)
        code_O = tl.where(zero_O == whole_O, (steps_O + ROUNDER) - ROUNDER, tl.floor(steps_O)) + whole_O
        code_O = tl.minimum(tl.maximum(code_O, min_code), max_code)
        diagonal = tl.load(upper + i * upper_row_stride + i * upper_column_stride)
        if reference is not None:
            w_O = tl.load(reference + i * weight_stride + o, mask=inside, other=0.0)
        error_O = tl.math.div_rn(w_O - (code_O - zero_O) * step_O, diagonal)
        later = (p > i) & (p < columns)
        upper_P = tl.load(upper + i * upper_row_stride + p * upper_column_stride, mask=later, other=0.0)
        w_PO -= upper_P[:, None] * error_O[None, :]
        tl.store(codes + i * all_rows + o, code_O.to(tl.int32).to(codes.dtype.element_ty), mask=inside)
        tl.store(error + i * all_rows + o, error_O, mask=inside)


def descend_panel(
    codes_PO: Tensor,
    error_PO: Tensor,
    gradient_PO: Tensor,
    hessian_PP: Tensor,
    step_PO: Tensor,
    limits: tuple[int, int],
) -> None:
    """One sweep of coordinate descent over a panel, in place: codes and errors.

    All float32, each column contiguous. gradient_PO: g of the panel's columns. limits: the smallest and largest code.
    """
    columns, rows = codes_PO.shape
    descent_kernel[(triton.cdiv(rows, ROWS),)](
        codes_PO, error_PO, gradient_PO, hessian_PP, step_PO, columns, rows,
        codes_PO.stride(0), error_PO.stride(0), gradient_PO.stride(0), *hessian_PP.stride(), step_PO.stride(0),
        *limits, WIDTH=triton.next_power_of_2(columns), ROWS_C=ROWS, num_warps=1,
    )  # fmt: skip


@triton.jit
def descent_kernel(
    codes, error, gradient, hessian, step, columns, rows,
    codes_stride, error_stride, gradient_stride, hessian_row_stride, hessian_column_stride, step_stride,
    min_code, max_code, WIDTH: tl.constexpr, ROWS_C: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * ROWS_C + tl.arange(0, ROWS_C)
    p = tl.arange(0, WIDTH)
    inside = o < rows
    present = (p < columns)[:, None] & inside[None, :]
    g_PO = tl.load(gradient + p[:, None] * gradient_stride + o[None, :], mask=present, other=0.0)
    for i in range(columns):
        g_O = tl.sum(tl.where((p == i)[:, None], g_PO, 0.0), axis=0)
        step_O = tl.load(step + i * step_stride + o, mask=inside, other=1.0)
        code_O = tl.load(codes + i * codes_stride + o, mask=inside, other=0.0)
        diagonal = tl.load(hessian + i * hessian_row_stride + i * hessian_column_stride)
        fixed_O = step_O < SMALLEST_STEP
        moved_O = code_O + tl.math.div_rn(tl.where(fixed_O, 0.0, g_O), tl.where(fixed_O, 1.0, step_O * diagonal))
        moved_O = tl.minimum(tl.maximum(moved_O, -LARGEST_ROUNDED), LARGEST_ROUNDED)
        moved_O = tl.minimum(tl.maximum((moved_O + ROUNDER) - ROUNDER, min_code), max_code)
        change_O = (moved_O - code_O) * step_O
        is_better_O = change_O * (g_O - 0.5 * diagonal * change_O) > 0
        change_O = tl.where(is_better_O, change_O, 0.0)
        error_O = tl.load(error + i * error_stride + o, mask=inside, other=0.0)
        row_P = tl.load(hessian + i * hessian_row_stride + p * hessian_column_stride, mask=p < columns, other=0.0)
        g_PO -= row_P[:, None] * change_O[None, :]
        tl.store(codes + i * codes_stride + o, tl.where(is_better_O, moved_O, code_O), mask=inside)
        tl.store(error + i * error_stride + o, error_O - change_O, mask=inside)
