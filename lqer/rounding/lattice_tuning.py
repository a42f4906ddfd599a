"""The blocks of a panel in a sweep of coordinate descent in one kernel, for lattice codes (rounding/ldlq_tuning.py).

For the blocks k of 8 columns of the panel, last to first, with the values Ẑ before the sweep and X after all changes so
far:

    C   = s (p1 + p2 / r) - Ẑ_k        the code nearest to X_k / s, as in lattice_sweep.py
    C   = 0                            in rows where C H_kk (C - 2 (X_k - Ẑ_k))ᵀ >= 0
    X_j = X_j - C F_jkᵀ                for all blocks j < k of the panel

It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: P columns of a panel, O out_features, K blocks of 8 columns, N rows of a program, B blocks of a panel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.formats.e8_kernel import DIMENSION_C, one_bit_tables, tables
from lqer.formats.e8p import RESIDUAL_SCALE
from lqer.rounding import lattice_sweep
from lqer.rounding.lattice_sweep import nearest_lattice, spread


def tune_lattice_panel(
    target_PO: Tensor, values_PO: Tensor, shares_PP: Tensor, hessian_PP: Tensor, scale_KO: Tensor, codes_KO: Tensor,
    bits: int,
) -> Tensor:  # fmt: skip
    """C of a panel, float32 [P, O]; its codes, int64 [K, O] contiguous, are changed in place.

    target_PO: X, values_PO: Ẑ, both float32, each column contiguous. shares_PP: F, hessian_PP: H, the panel's blocks on
    the diagonal, float32. scale_KO: float32, s of each block and row. bits: of the lattice code, 2 to 4.
    """
    columns, rows = target_PO.shape
    change_PO = torch.empty(columns, rows, dtype=torch.float32, device=target_PO.device)
    # A program has as many rows as one of LDLQ's own sweep, for the same reason. F is read by columns.
    lattice_tuning_kernel[(triton.cdiv(rows, lattice_sweep.ROWS),)](
        target_PO, values_PO, shares_PP, hessian_PP, scale_KO, codes_KO, change_PO,
        tables(target_PO.device), one_bit_tables(target_PO.device), RESIDUAL_SCALE.get(bits, 1.0), columns, rows,
        target_PO.stride(0), values_PO.stride(0), *reversed(shares_PP.stride()), *hessian_PP.stride(),
        *scale_KO.stride(),
        BITS=bits, BLOCKS=triton.next_power_of_2(len(codes_KO)), ROWS_C=lattice_sweep.ROWS, num_warps=1,
    )  # fmt: skip
    return change_PO


@triton.jit
def lattice_tuning_kernel(
    target, values, shares, hessian, scale, codes, change, table, one_bit_points, residual_scale, columns, rows,
    target_stride, values_stride, shares_row_stride, shares_column_stride, hessian_row_stride, hessian_column_stride,
    scale_block_stride, scale_stride,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS_C: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * ROWS_C + tl.arange(0, ROWS_C)
    inside = o < rows
    b = tl.arange(0, BLOCKS)
    d = tl.arange(0, DIMENSION_C)
    p_B8 = b[:, None] * DIMENSION_C + d[None, :]
    present_B8N = (p_B8 < columns)[:, :, None] & inside[None, None, :]
    target_B8N = tl.load(target + p_B8[:, :, None] * target_stride + o[None, None, :], mask=present_B8N, other=0.0)
    blocks = tl.cdiv(columns, DIMENSION_C)
    for i in range(blocks):
        k = blocks - 1 - i
        p_8 = k * DIMENSION_C + d
        present_8N = (p_8 < columns)[:, None] & inside[None, :]
        scale_N = tl.load(scale + k * scale_block_stride + o * scale_stride, mask=inside, other=0.0)
        divisor_N = tl.where(scale_N == 0, 1.0, scale_N)
        now_8N = tl.sum(tl.where((b == k)[:, None, None], target_B8N, 0.0), axis=0)
        x_8N = tl.math.div_rn(now_8N, tl.broadcast_to(divisor_N[None, :], now_8N.shape))
        code_N, value_8N = nearest_lattice(x_8N, table, one_bit_points, residual_scale, BITS)
        before_8N = tl.load(values + p_8[:, None] * values_stride + o[None, :], mask=present_8N, other=0.0)
        # A ragged last block has no columns beyond the panel.
        change_8N = tl.where(present_8N, value_8N * scale_N[None, :] - before_8N, 0.0)
        rest_8N = change_8N - 2 * tl.where(present_8N, now_8N - before_8N, 0.0)
        weighted_8N = tl.zeros_like(rest_8N)
        for j in range(DIMENSION_C):
            rest_N = tl.sum(tl.where((d == j)[:, None], rest_8N, 0.0), axis=0)
            column = tl.minimum(k * DIMENSION_C + j, columns - 1)
            of_column = hessian + p_8 * hessian_row_stride + column * hessian_column_stride
            hessian_8 = tl.load(of_column, mask=p_8 < columns, other=0.0)
            weighted_8N += hessian_8[:, None] * rest_N[None, :]
        better_N = tl.sum(change_8N * weighted_8N, axis=0) < 0
        change_8N = tl.where(better_N[None, :], change_8N, 0.0)
        tl.store(codes + k * rows + o, code_N, mask=inside & better_N)
        tl.store(change + p_8[:, None] * rows + o[None, :], change_8N, mask=present_8N)
        target_B8N = spread(target_B8N, -change_8N, shares, k, columns, shares_row_stride, shares_column_stride, BLOCKS)
