"""Device functions of the low-rank branch Q(Q(x A) B), computed in the same kernel as the product with W.

The first programs of a grid compute Q(x A). Each multiplies a split of x's columns by A; the one that finishes last
adds the partial sums (split_k.py), rounds and increments `ready`. The other programs multiply with W meanwhile; those
that need Q(x A) wait for `ready`. This cannot deadlock, because programs are scheduled in the order of their numbers
and the first ones never wait.

Counters (int32, zero before and after, for each tile of tokens): `ready`, then one per block of ranks for its finished
splits. Every consumer increments `ready` once more, and the last one resets it.

Shapes: M tokens, I in_features, O out_features, R rank (padded to whole blocks), C columns of a factor, B blocks.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.decode import dot, exponent_to_scale
from lqer.kernels.layout.codes import ROW_PADDING
from lqer.kernels.ordered_tokens import store_tokens
from lqer.kernels.rounding import round_columns
from lqer.kernels.split_k import store_partial, sum_partials

PARTIALS_AT_ONCE = tl.constexpr(8)
# A finished block of ranks adds this to `ready`; a consumer adds one.
BLOCK_READY = tl.constexpr(1 << 20)
SEGMENT_ROWS_C = tl.constexpr(ROW_PADDING)


@triton.jit
def first_rank_of(segments, row, own_rank: tl.constexpr):
    """Where the part of x A begins that a tile of rows from `row` on multiplies; segments: as in joint.py, or None."""
    if segments is None:
        return 0
    else:
        return tl.load(segments + row // SEGMENT_ROWS_C) * own_rank


@triton.jit
def load_factor(
    codes,
    exponents,
    first_row,
    columns_C,
    n_columns,
    n_rows,
    rows: tl.constexpr,
    block: tl.constexpr,
    dtype: tl.constexpr,
):
    """`rows` rows of B [n_rows, n_columns] in `dtype`, from int8 codes with exponents, or from values.

    Elements outside B are zero.
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
    padded_columns,
    columns: tl.constexpr,
    block: tl.constexpr,
    dtype: tl.constexpr,
):
    """`columns` columns of Aᵀ [n_ranks, padded_columns] in `dtype`, from int8 codes with exponents, or from values.

    Elements outside Aᵀ are zero.
    """
    width: tl.constexpr = ranks_R.shape[0]
    columns_I = first + tl.arange(0, columns)
    inside = (ranks_R < n_ranks)[:, None] & (columns_I < padded_columns)[None, :]
    values = tl.load(codes + ranks_R[:, None] * padded_columns + columns_I[None, :], mask=inside, other=0)
    if exponents is None:
        return values.to(dtype)
    else:
        blocks: tl.constexpr = columns // block
        columns_B = first // block + tl.arange(0, blocks)
        inside_B = (ranks_R < n_ranks)[:, None] & (columns_B * block < padded_columns)[None, :]
        place = exponents + ranks_R[:, None] * (padded_columns // block) + columns_B[None, :]
        scale = exponent_to_scale(tl.load(place, mask=inside_B, other=0), tl.float32).reshape(width, blocks, 1)
        scaled = values.to(tl.float32).reshape(width, blocks, block) * scale
        return scaled.reshape(width, columns).to(dtype)


@triton.jit
def project_rank(
    x,  # [I], not rounded
    a_codes,  # Aᵀ [RP, IP] int8 or plain
    a_exponents,  # [RP, IP / a_block] uint8, or None
    place,  # of the result, float32
    r,  # which rank
    K,
    padded_columns: tl.constexpr,
    rounding: tl.constexpr,
    a_block: tl.constexpr,
    BLOCK_K: tl.constexpr,
    pdl: tl.constexpr,
):
    """Element r of x_q A for one token, over all of K."""
    ranks_R = r + tl.arange(0, 1)
    # A does not depend on the previous kernel.
    a_RI = load_transposed(a_codes, a_exponents, ranks_R, 0, r + 1, padded_columns, BLOCK_K, a_block, tl.float32)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    acc_I = tl.zeros((1, BLOCK_K), tl.float32)
    for first in tl.static_range(0, padded_columns, BLOCK_K):
        if first > 0:
            a_RI = load_transposed(
                a_codes, a_exponents, ranks_R, first, r + 1, padded_columns, BLOCK_K, a_block, tl.float32
            )
        columns_I = first + tl.arange(0, BLOCK_K)
        x_I = tl.load(x + columns_I, mask=columns_I < K, other=0.0).to(tl.float32).reshape(1, BLOCK_K)
        if rounding.bits > 0:
            x_I = round_columns(x_I, rounding)
        acc_I += x_I * a_RI
    tl.store(place + tl.arange(0, 1), tl.sum(acc_I, axis=1))


@triton.jit
def project_split(
    x,  # [M, I], not rounded
    a_codes,  # Aᵀ [RP, IP] int8 or plain
    a_exponents,  # [RP, IP / a_block] uint8, or None
    x_out,  # for the rounded x, or None
    writes_x,  # whether this program writes it
    split,
    rows_M,
    rows_x_M,  # of the same tokens in x
    ranks_R,
    M,
    K,
    x_stride,
    rank: tl.constexpr,
    padded_columns: tl.constexpr,
    SPLIT_K: tl.constexpr,  # columns of a split
    BLOCK_K: tl.constexpr,
    rounding: tl.constexpr,
    a_block: tl.constexpr,
    stages: tl.constexpr,
    tile_k: tl.constexpr = 0,  # these two: the order of the rounded x (`store_tokens`)
    steps: tl.constexpr = False,
):
    """x_q A over the columns of one split, float32 [M, R]."""
    row_inside = (rows_M < M)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    acc_MR = tl.zeros((rows_M.shape[0], ranks_R.shape[0]), tl.float32)
    for first in tl.range(split * SPLIT_K, split * SPLIT_K + SPLIT_K, BLOCK_K, num_stages=stages):
        columns_I = first + tl.arange(0, BLOCK_K)
        inside = row_inside & (columns_I < K)[None, :]
        x_MI = tl.load(x + rows_x_M.to(tl.int64)[:, None] * x_stride + columns_I[None, :], mask=inside, other=0.0)
        if rounding.bits > 0:
            x_MI = round_columns(x_MI.to(tl.float32), rounding).to(dtype)
            if x_out is not None:
                if writes_x:
                    rows_M1 = rows_M.to(tl.int64)[:, None]
                    store_tokens(x_MI, x_out, rows_M1, columns_I[None, :], M, K, padded_columns, tile_k, steps)
        a_RI = load_transposed(a_codes, a_exponents, ranks_R, first, rank, padded_columns, BLOCK_K, a_block, dtype)
        acc_MR = dot(x_MI, tl.trans(a_RI), acc_MR)
    return acc_MR


@triton.jit
def finish_projection(
    acc_MR,  # float32, the partial sum of this program
    partial,  # [splits, M, RP] float32
    projection,  # [M, RP]
    counter,  # of this tile of tokens and block of ranks, zero before and after
    split,
    rows_M,
    ranks_R,
    M,
    rank: tl.constexpr,
    splits: tl.constexpr,
    rounding: tl.constexpr,
):
    """Store a partial sum of x A; the last program writes Q(x A). True for that one."""
    inside_M1 = (rows_M < M)[:, None]
    offset_MR = rows_M[:, None] * rank + ranks_R[None, :]
    last = store_partial(acc_MR, partial, offset_MR, inside_M1, M * rank, counter, split, splits)
    if last:
        xa_MR = sum_partials(acc_MR, partial, offset_MR, inside_M1, M * rank, counter, splits, PARTIALS_AT_ONCE)
        write_projection(xa_MR, projection, rows_M, ranks_R, M, rank, rounding)
    return last


@triton.jit
def write_projection(
    xa_MR,
    projection,
    rows_M,
    ranks_R,
    M,
    rank: tl.constexpr,
    rounding: tl.constexpr,
):
    """Write Q(x A), from x A in float32."""
    if rounding.bits > 0:
        xa_MR = round_columns(xa_MR, rounding)
    place = projection + rows_M[:, None] * rank + ranks_R[None, :]
    tl.store(place, xa_MR.to(projection.dtype.element_ty), mask=(rows_M < M)[:, None])


@triton.jit
def produce_projection(
    producer,  # number of this program
    x,  # [M, I], not rounded
    a_codes,  # Aᵀ [RP, IP] int8 or values
    a_exponents,  # [RP, IP / a_block] uint8, or None
    partial,  # [splits, M, RP] float32
    projection,  # [M, RP]
    counters,
    M,
    K,
    x_stride,
    rank: tl.constexpr,
    padded_columns: tl.constexpr,
    splits: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    rounding: tl.constexpr,
    a_block: tl.constexpr,
):
    """One split of x A for a tile of tokens and a block of ranks; the last one also writes Q(x A)."""
    rank_blocks: tl.constexpr = rank // BLOCK_R
    # Few enough columns at once to need no more registers than the other programs of the kernel.
    BLOCK_K: tl.constexpr = max(64, min(SPLIT_K, 2048 // max(BLOCK_M, BLOCK_R)))
    split, pid_r, pid_m = producer % splits, producer // splits % rank_blocks, producer // (splits * rank_blocks)
    rows_M = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_R = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc_MR = project_split(
        x, a_codes, a_exponents, None, False, split, rows_M, rows_M, ranks_R, M, K, x_stride,
        rank, padded_columns, SPLIT_K, BLOCK_K, rounding, a_block, 1,
    )  # fmt: skip
    ready = counters + pid_m * (rank_blocks + 1)
    if finish_projection(
        acc_MR, partial, projection, ready + 1 + pid_r, split, rows_M, ranks_R, M, rank, splits, rounding
    ):
        tl.debug_barrier()
        tl.atomic_add(ready, BLOCK_READY, sem="release")


@triton.jit
def await_projection(counters, pid_m, consumers, rank_blocks: tl.constexpr):
    """Wait for Q(x A) of a tile of tokens; each of its `consumers` programs calls this once."""
    ready = counters + pid_m * (rank_blocks + 1)
    done: tl.constexpr = BLOCK_READY * rank_blocks
    while tl.atomic_add(ready, 0, sem="acquire") < done:
        pass
    if tl.atomic_add(ready, 1, sem="relaxed") == done + consumers - 1:
        tl.store(ready, 0)
