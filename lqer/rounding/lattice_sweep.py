"""The blocks of a panel of LDLQ's sweep in one kernel, for lattice codes (rounding/ldlq.py, formats/e8p.py).

For the blocks k of 8 columns of the panel, last to first, with Z the weight, T the weight after all feedback so far:

    Ẑ_k = s (p1 + p2 / r)        p1, p2: the points nearest to T_k / s and to r (T_k / s - p1); without p2 at 2 bits
    e_k = Z_k - Ẑ_k
    T_j = T_j + 𝓛_kjᵀ e_k                                              for all blocks j < k of the panel

In PyTorch a block costs some twenty launches of a few microseconds; here a program keeps its rows of the panel in
registers and walks the blocks. It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: P columns of a panel, O out_features, K blocks of 8 columns, N rows of a program, B blocks of a panel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.formats.e8_kernel import DIMENSION_C, nearest_e8_one_bit, nearest_e8p, one_bit_tables, tables
from lqer.formats.e8p import FIRST_BITS, RESIDUAL_SCALE

# Rows of a program, which is one warp. Blocks come one after the other: many programs with few rows hide each other's
# latency.
ROWS = 8
FIRST_BITS_C = tl.constexpr(FIRST_BITS)


def sweep_lattice_panel(
    target_PO: Tensor, weight_PO: Tensor, lower_PP: Tensor, scale_O: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """int64 codes [K, O] and errors Z - Ẑ, float32 [P, O], of a panel; its tensors are left as they are.

    target_PO: T, weight_PO: Z, both float32, each column contiguous. lower_PP: float32, the panel's block of 𝓛 on the
    diagonal. scale_O: float32, s of each row, or broadcast to it by strides. bits: of the lattice code, 2 to 4.
    """
    columns, rows = target_PO.shape
    blocks = triton.cdiv(columns, DIMENSION_C.value)
    codes_KO = torch.empty(blocks, rows, dtype=torch.int64, device=target_PO.device)
    error_PO = torch.empty(columns, rows, dtype=torch.float32, device=target_PO.device)
    lattice_sweep_kernel[(triton.cdiv(rows, ROWS),)](
        target_PO, weight_PO, lower_PP, scale_O, codes_KO, error_PO,
        tables(target_PO.device), one_bit_tables(target_PO.device), RESIDUAL_SCALE.get(bits, 1.0), columns, rows,
        target_PO.stride(0), weight_PO.stride(0), *lower_PP.stride(), scale_O.stride(0),
        BITS=bits, BLOCKS=triton.next_power_of_2(blocks), ROWS_C=ROWS, num_warps=1,
    )  # fmt: skip
    return codes_KO, error_PO


@triton.jit
def lattice_sweep_kernel(
    target, weight, lower, scale, codes, error, table, one_bit_points, residual_scale, columns, rows,
    target_stride, weight_stride, lower_row_stride, lower_column_stride, scale_stride,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS_C: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * ROWS_C + tl.arange(0, ROWS_C)
    inside = o < rows
    b = tl.arange(0, BLOCKS)
    d = tl.arange(0, DIMENSION_C)
    p_B8 = b[:, None] * DIMENSION_C + d[None, :]
    present_B8N = (p_B8 < columns)[:, :, None] & inside[None, None, :]
    target_B8N = tl.load(target + p_B8[:, :, None] * target_stride + o[None, None, :], mask=present_B8N, other=0.0)
    scale_N = tl.load(scale + o * scale_stride, mask=inside, other=0.0)
    divisor_N = tl.where(scale_N == 0, 1.0, scale_N)
    blocks = tl.cdiv(columns, DIMENSION_C)
    for i in range(blocks):
        k = blocks - 1 - i
        now_8N = tl.sum(tl.where((b == k)[:, None, None], target_B8N, 0.0), axis=0)
        x_8N = tl.math.div_rn(now_8N, tl.broadcast_to(divisor_N[None, :], now_8N.shape))
        code_N, value_8N = nearest_lattice(x_8N, table, one_bit_points, residual_scale, BITS)
        tl.store(codes + k * rows + o, code_N, mask=inside)
        p_8 = k * DIMENSION_C + d
        present_8N = (p_8 < columns)[:, None] & inside[None, :]
        weight_8N = tl.load(weight + p_8[:, None] * weight_stride + o[None, :], mask=present_8N, other=0.0)
        # A ragged last block has no columns beyond the panel.
        error_8N = tl.where(present_8N, weight_8N - value_8N * scale_N[None, :], 0.0)
        tl.store(error + p_8[:, None] * rows + o[None, :], error_8N, mask=present_8N)
        target_B8N = spread(target_B8N, error_8N, lower, k, columns, lower_row_stride, lower_column_stride, BLOCKS)


@triton.jit
def nearest_lattice(x_8N, table, one_bit_points, residual_scale, BITS: tl.constexpr):
    """Codes, int64 [N], and points [8, N], in units of the scale, of lattice codes nearest to vectors [8, N]."""
    code_N, value_8N = nearest_e8p(x_8N, table)
    code_N = code_N.to(tl.int64)
    if BITS > 2:
        residual_8N = (x_8N - value_8N) * residual_scale
        if BITS == 3:
            residual_code_N, point_8N = nearest_e8_one_bit(residual_8N, one_bit_points)
        else:
            residual_code_N, point_8N = nearest_e8p(residual_8N, table)
        code_N = code_N | (residual_code_N.to(tl.int64) << FIRST_BITS_C)
        value_8N += tl.math.div_rn(point_8N, tl.zeros_like(point_8N) + residual_scale)
    return code_N, value_8N


@triton.jit
def spread(
    target_B8N, error_8N, lower, k, columns, lower_row_stride, lower_column_stride, BLOCKS: tl.constexpr
):  # fmt: skip
    """The targets [B, 8, N] of a panel with the errors [8, N] of its block k added to those of the blocks before it."""
    d = tl.arange(0, DIMENSION_C)
    p_B8 = tl.arange(0, BLOCKS)[:, None] * DIMENSION_C + d[None, :]
    earlier_B8 = p_B8 < k * DIMENSION_C
    for j in range(DIMENSION_C):
        error_N = tl.sum(tl.where((d == j)[:, None], error_8N, 0.0), axis=0)
        row = tl.minimum(k * DIMENSION_C + j, columns - 1)
        lower_B8 = tl.load(lower + row * lower_row_stride + p_B8 * lower_column_stride, mask=earlier_B8, other=0.0)
        target_B8N += lower_B8[:, :, None] * error_N[None, None, :]
    return target_B8N
