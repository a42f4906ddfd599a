"""Device functions of the low-rank branch: Q(Q(x A) B), beside the product with W in one kernel.

The first programs of a grid produce Q(x A): each multiplies a slab of x's columns by A's rows, the one that finishes
last adds the slabs up in a fixed order, so that runs agree bit for bit, rounds the sum and raises `ready`. The other
programs multiply with W meanwhile and wait for `ready` only when they are done with that. Programs start in the order
of their numbers and producers wait for nobody, so the wait ends.

Counters (int32, zero before and after, for each tile of tokens): `ready`, and one of finished slabs for each block of
ranks. A consumer that has waited counts itself in `ready`, and the last one sets it back to zero.

Shapes: M tokens, N out_features, K in_features, R rank (padded to whole blocks), C columns of a factor.
"""

import triton
import triton.language as tl

from .decode import dot, exponent_to_scale
from .rounding import round_columns

SLABS_AT_ONCE = tl.constexpr(8)
# What a finished block of ranks adds to `ready`; consumers add one each.
BLOCK_READY = tl.constexpr(1 << 20)


@triton.jit
def load_factor(
    codes,
    exponents,
    first_row,
    columns_C,
    n_columns,
    n_rows,  # of the factor
    rows: tl.constexpr,
    block: tl.constexpr,
    dtype: tl.constexpr,
):
    """`rows` rows of B [., n_columns] in `dtype`: int8 codes with step exponents per `block` rows, or values.

    Rows from n_rows on and columns from n_columns on are zero.
    """
    rows_R = first_row + tl.arange(0, rows)
    inside = (rows_R < n_rows)[:, None] & (columns_C < n_columns)[None, :]
    values = tl.load(codes + rows_R.to(tl.int64)[:, None] * n_columns + columns_C[None, :], mask=inside, other=0)
    if exponents is None:
        return values.to(dtype)
    else:
        blocks: tl.constexpr = rows // block
        width: tl.constexpr = values.shape[1]
        rows_B = first_row // block + tl.arange(0, blocks)
        inside_B = (rows_B * block < n_rows)[:, None] & (columns_C < n_columns)[None, :]
        place = exponents + rows_B.to(tl.int64)[:, None] * n_columns + columns_C[None, :]
        scale = exponent_to_scale(tl.load(place, mask=inside_B, other=0), tl.float32).reshape(blocks, 1, width)
        scaled = values.to(tl.float32).reshape(blocks, block, width) * scale
        return scaled.reshape(rows, width).to(dtype)


@triton.jit
def load_transposed(
    codes,
    exponents,
    ranks_R,
    first,
    n_ranks,
    padded_K,
    columns: tl.constexpr,
    block: tl.constexpr,
    dtype: tl.constexpr,
):
    """`columns` columns of Aᵀ [n_ranks, padded_K] in `dtype`: codes with step exponents per `block` columns, or values.

    Columns from padded_K on are zero.
    """
    width: tl.constexpr = ranks_R.shape[0]
    columns_K = first + tl.arange(0, columns)
    inside = (ranks_R < n_ranks)[:, None] & (columns_K < padded_K)[None, :]
    values = tl.load(codes + ranks_R[:, None] * padded_K + columns_K[None, :], mask=inside, other=0)
    if exponents is None:
        return values.to(dtype)
    else:
        blocks: tl.constexpr = columns // block
        columns_B = first // block + tl.arange(0, blocks)
        inside_B = (ranks_R < n_ranks)[:, None] & (columns_B * block < padded_K)[None, :]
        place = exponents + ranks_R[:, None] * (padded_K // block) + columns_B[None, :]
        scale = exponent_to_scale(tl.load(place, mask=inside_B, other=0), tl.float32).reshape(width, blocks, 1)
        scaled = values.to(tl.float32).reshape(width, blocks, block) * scale
        return scaled.reshape(width, columns).to(dtype)


@triton.jit
def produce_projection(
    producer,  # number of this program among the producers
    x,  # [M, K], rows `x_stride` apart, not rounded
    a_codes,  # Aᵀ [RP, KP] int8 or plain
    a_exponents,  # [RP, KP / a_block] uint8, or None
    partial,  # [slabs, M, RP] float32
    projection,  # [M, RP]
    counters,
    M,
    K,
    x_stride,
    rank: tl.constexpr,
    padded_K: tl.constexpr,
    slabs: tl.constexpr,
    SLAB_K: tl.constexpr,  # columns of a slab
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    x_bits: tl.constexpr,  # 0: activations are not rounded
    x_block: tl.constexpr,
    x_ceil: tl.constexpr,
    a_block: tl.constexpr,
):
    """One slab of one tile of tokens and one block of ranks; for the last of the slabs, Q(x A) too."""
    rank_blocks: tl.constexpr = rank // BLOCK_R
    # So few columns at once that producers need no more registers than the other programs of their kernel.
    BLOCK_K: tl.constexpr = max(64, min(SLAB_K, 2048 // max(BLOCK_M, BLOCK_R)))
    slab, pid_r, pid_m = producer % slabs, producer // slabs % rank_blocks, producer // (slabs * rank_blocks)
    rows_M = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_R = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_inside = (rows_M < M)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    acc_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(slab * SLAB_K, slab * SLAB_K + SLAB_K, BLOCK_K):
        columns_K = first + tl.arange(0, BLOCK_K)
        inside = row_inside & (columns_K < K)[None, :]
        x_MK = tl.load(x + rows_M.to(tl.int64)[:, None] * x_stride + columns_K[None, :], mask=inside, other=0.0)
        if x_bits > 0:
            x_MK = round_columns(x_MK.to(tl.float32), x_block, x_bits, x_ceil).to(dtype)
        a_RK = load_transposed(a_codes, a_exponents, ranks_R, first, rank, padded_K, BLOCK_K, a_block, dtype)
        acc_MR = dot(x_MK, tl.trans(a_RK), acc_MR)
    offset_MR = rows_M[:, None] * rank + ranks_R[None, :]
    tl.store(partial + slab * (M * rank) + offset_MR, acc_MR, mask=row_inside)
    # Every thread's part of the slab has to be out before this program counts as finished.
    tl.debug_barrier()
    ready = counters + pid_m * (rank_blocks + 1)
    finished = ready + 1 + pid_r
    if tl.atomic_add(finished, 1, sem="acq_rel") == slabs - 1:
        tl.store(finished, 0)
        xa_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for first in range(0, slabs, SLABS_AT_ONCE):
            for i in tl.static_range(SLABS_AT_ONCE):
                place = partial + (first + i) * (M * rank) + offset_MR
                xa_MR += tl.load(place, mask=row_inside & (first + i < slabs), other=0.0)
        if x_bits > 0:
            xa_MR = round_columns(xa_MR, x_block, x_bits, x_ceil)
        tl.store(projection + offset_MR, xa_MR.to(dtype), mask=row_inside)
        tl.debug_barrier()
        tl.atomic_add(ready, BLOCK_READY, sem="release")


@triton.jit
def await_projection(counters, pid_m, consumers, rank_blocks: tl.constexpr):
    """Return once Q(x A) of a tile of tokens is there; each of its `consumers` programs calls this once."""
    ready = counters + pid_m * (rank_blocks + 1)
    done: tl.constexpr = BLOCK_READY * rank_blocks
    while tl.atomic_add(ready, 0, sem="acquire") < done:
        pass
    if tl.atomic_add(ready, 1, sem="relaxed") == done + consumers - 1:
        tl.store(ready, 0)
