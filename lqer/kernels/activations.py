"""Kernels that round activations, in natural or kernel order, and multiply them by A.

Shapes: M tokens, I in_features, R rank (padded), T columns of a program.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.low_rank import finish_projection, project_rank, project_split, write_projection
from lqer.kernels.ordered_tokens import store_tokens
from lqer.kernels.rounding import round_columns


# M changes from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def round_kernel(
    x,  # [M, I]
    x_out,  # rounded: [M, I], or [M, IP] in the order of decoded columns
    M,
    K,
    x_stride,  # between rows of x
    padded: tl.constexpr,  # IP
    tile_k: tl.constexpr,  # columns of a tile, for the order of integer codes
    steps: tl.constexpr,  # the order of integer groups; neither: natural order
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    rounding: tl.constexpr,
    pdl: tl.constexpr,
):
    """x_out = Q(x) for BLOCK_M tokens and BLOCK_K columns; x itself if it is only to be ordered."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    rows_M = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    columns_T = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (rows_M < M) & (columns_T < K)
    x_MT = tl.load(x + rows_M * x_stride + columns_T, mask=inside, other=0.0)
    if rounding.bits > 0:
        x_MT = round_columns(x_MT.to(tl.float32), rounding).to(x.dtype.element_ty)
    store_tokens(x_MT, x_out, rows_M, columns_T, M, K, padded, tile_k, steps)


# M changes from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def project_kernel(
    x,  # [M, I]
    a_codes,  # Aᵀ [RP, IP] int8 or plain
    a_exponents,  # [RP, IP / a_block] uint8, or None
    x_out,  # rounded: [M, I], or [M, IP] in the order of decoded columns; written only if activations are rounded
    partial,  # [splits, M, RP] float32, or None for one split
    projection,  # Q(x A), [M, RP]
    counters,  # int32, one per tile of tokens and block of ranks, zero before and after
    M,
    K,
    x_stride,
    rank: tl.constexpr,
    padded_columns: tl.constexpr,
    splits: tl.constexpr,
    SPLIT_K: tl.constexpr,
    rounding: tl.constexpr,
    a_block: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    stages: tl.constexpr,
    tile_k: tl.constexpr,  # these two as in `round_kernel`
    steps: tl.constexpr,
    pdl: tl.constexpr,
):
    """Q(x_q A) for BLOCK_M tokens and BLOCK_R ranks, over one split of K; the programs of the first ranks write x_q."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    split, pid_m, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows_M = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_R = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc_MR = project_split(
        x, a_codes, a_exponents, x_out, pid_r == 0, split, rows_M, rows_M, ranks_R, M, K, x_stride,
        rank, padded_columns, SPLIT_K, BLOCK_K, rounding, a_block, stages, tile_k, steps,
    )  # fmt: skip
    if splits == 1:
        write_projection(acc_MR, projection, rows_M, ranks_R, M, rank, rounding)
    else:
        counter = counters + pid_m * (rank // BLOCK_R) + pid_r
        finish_projection(acc_MR, partial, projection, counter, split, rows_M, ranks_R, M, rank, splits, rounding)


@triton.jit
def prepare_activations_kernel(
    x,  # [M, I]
    a_codes,  # Aᵀ [RP, IP] int8 or plain
    a_exponents,  # [RP, IP / a_block] uint8, or None
    x_out,  # [M, I], rounded; written only if activations are rounded
    projection,  # x_q A [M, RP] float32, not rounded
    K,
    x_stride,
    rank: tl.constexpr,
    padded_columns: tl.constexpr,
    rounding: tl.constexpr,
    a_block: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,  # that a program rounds
    pdl: tl.constexpr,
):
    """Few tokens: the first `rank` programs of a token compute one element of x_q A each, the others round it."""
    pid, token = tl.program_id(0), tl.program_id(1)
    x += token.to(tl.int64) * x_stride
    if pid < rank:
        place = projection + token * rank + pid
        project_rank(x, a_codes, a_exponents, place, pid, K, padded_columns, rounding, a_block, BLOCK_K, pdl)
    elif rounding.bits > 0:
        if pdl:
            gdc_wait()
            gdc_launch_dependents()
        columns = (pid - rank) * COLUMNS + tl.arange(0, COLUMNS)
        x_I = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32).reshape(1, COLUMNS)
        x_I = round_columns(x_I, rounding).reshape(COLUMNS)
        tl.store(x_out + token * K + columns, x_I.to(x.dtype.element_ty), mask=columns < K)
