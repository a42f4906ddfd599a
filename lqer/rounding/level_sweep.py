"""The columns of a panel of GPTQ's or LDLQ's sweep in one kernel, for values that are multiples of a few levels.

For columns p = 0 .. P - 1 of the panel, first to last, as in `sweep.py`:

    k_p = number of boundaries below w_p / s_p        q_p = level_k s_p
    e_p = (w_p - q_p) / U_pp                          w_j = w_j - U_pj e_p        for all j > p of the panel

It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: E matrices, O out_features, N rows of all matrices, P columns of a panel, K levels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.formats.spacing import Levels

# Rows of a program: one warp, whose registers hold 128 columns of them.
ROWS = 32
# Boundaries that a value is compared with at once.
COMPARED = 16


def sweep_level_panel(
    weight_PEO: Tensor, upper_EPP: Tensor, levels: Levels, reference_PEO: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """uint8 codes (P, N) and scaled errors (P, N), float32, of a panel; arguments as for `sweep.sweep_panel`.

    levels: step (P, N), or broadcast to it by strides.
    """
    columns, matrices, rows = weight_PEO.shape
    step_PN = levels.step_G
    index_PN = torch.empty(columns, matrices * rows, dtype=torch.uint8, device=weight_PEO.device)
    error_PN = torch.empty(columns, matrices * rows, dtype=torch.float32, device=weight_PEO.device)
    level_sweep_kernel[(triton.cdiv(rows, ROWS), matrices)](
        weight_PEO, reference_PEO, upper_EPP, step_PN, levels.levels_K, levels.boundaries_K, index_PN, error_PN,
        columns, rows, matrices * rows, len(levels.boundaries_K),
        weight_PEO.stride(0), *upper_EPP.stride(), *step_PN.stride(),
        WIDTH=triton.next_power_of_2(columns), ROWS_C=ROWS, COMPARED_C=COMPARED, num_warps=1,
    )  # fmt: skip
    return levels.codes_K[index_PN.to(torch.int32)], error_PN


@triton.jit
def level_sweep_kernel(
    weight, reference, upper, step, level, boundary, index, error, columns, rows, all_rows, boundaries,
    weight_stride, upper_matrix_stride, upper_row_stride, upper_column_stride, step_column_stride, step_row_stride,
    WIDTH: tl.constexpr, ROWS_C: tl.constexpr, COMPARED_C: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1)
    o = tl.program_id(0) * ROWS_C + tl.arange(0, ROWS_C)
    p = tl.arange(0, WIDTH)
    b = tl.arange(0, COMPARED_C)
    inside = o < rows
    o += matrix * rows
    upper += matrix.to(tl.int64) * upper_matrix_stride
    present = (p < columns)[:, None] & inside[None, :]
    w_PO = tl.load(weight + p[:, None] * weight_stride + o[None, :], mask=present, other=0.0)
    for i in range(columns):
        w_O = tl.sum(tl.where((p == i)[:, None], w_PO, 0.0), axis=0)
        step_O = tl.load(step + i * step_column_stride + o * step_row_stride, mask=inside, other=0.0)
        share_O = tl.where(step_O == 0, 0.0, tl.math.div_rn(w_O, tl.where(step_O == 0, 1.0, step_O)))
        index_O = tl.zeros((ROWS_C,), tl.int32)
        for first in range(0, boundaries, COMPARED_C):
            boundary_B = tl.load(boundary + first + b, mask=first + b < boundaries, other=float("inf"))
            index_O += tl.sum((share_O[None, :] > boundary_B[:, None]).to(tl.int32), axis=0)
        if reference is not None:
            w_O = tl.load(reference + i * weight_stride + o, mask=inside, other=0.0)
        diagonal = tl.load(upper + i * upper_row_stride + i * upper_column_stride)
        error_O = tl.math.div_rn(w_O - tl.load(level + index_O) * step_O, diagonal)
        later = (p > i) & (p < columns)
        upper_P = tl.load(upper + i * upper_row_stride + p * upper_column_stride, mask=later, other=0.0)
        w_PO -= upper_P[:, None] * error_O[None, :]
        tl.store(index + i * all_rows + o, index_O.to(tl.uint8), mask=inside)
        tl.store(error + i * all_rows + o, error_O, mask=inside)
