"""Device functions of the low-rank branch of up to 16 tokens, from partial sums of x A (hadamard.py).

Every split of K adds the product of B with some of the ranks, so that all programs do as much.

Shapes: M tokens, O out_features, R rank (padded), S partial sums of x A.
"""

import triton
import triton.language as tl

from lqer.kernels.low_rank import first_rank_of

PROJECTION_ELEMENTS = tl.constexpr(4096)


@triton.jit
def load_ranks(b_values, rows_O, first_rank, N, rank: tl.constexpr, BLOCK_R: tl.constexpr):
    """Bᵀ [O, R] of the ranks from `first_rank` on, zero outside B [R, O]."""
    ranks_R = first_rank + tl.arange(0, BLOCK_R)
    place = b_values + ranks_R[None, :] * N + rows_O[:, None]
    return tl.load(place, mask=(rows_O < N)[:, None] & (ranks_R < rank)[None, :], other=0.0)


@triton.jit
def add_ranks(
    acc_OM,
    b_OR,  # `load_ranks` from `first_rank` on, loaded early
    b_values,  # [own rank, O] in the dtype of the layer
    projection,  # partial sums of x A, float32 [projection_splits, M, RP]
    rows_O,
    first_row,  # of rows_O
    first_rank,  # of this split
    segments,  # int32 [O / 64], see joint.py, or None
    M,
    N,
    rank: tl.constexpr,  # of all segments
    own_rank: tl.constexpr,  # of one
    splits: tl.constexpr,
    projection_splits: tl.constexpr,
    BLOCK_S: tl.constexpr,  # projection_splits, as a power of two
    TOKENS: tl.constexpr,  # M, rounded up to a power of two
    BLOCK_R: tl.constexpr,
):
    """acc_OM + (x A B)ᵀ over the ranks of a split: BLOCK_R from `first_rank` on, and every splits * BLOCK_R further."""
    BLOCK_N: tl.constexpr = acc_OM.shape[0]
    BLOCK_M: tl.constexpr = acc_OM.shape[1]
    own = first_rank_of(segments, first_row, own_rank)
    for turn in tl.static_range(0, own_rank, splits * BLOCK_R):
        first = first_rank + turn
        if first < own_rank:
            if turn > 0:
                b_OR = load_ranks(b_values, rows_O, first, N, own_rank, BLOCK_R)
            ranks_R = own + first + tl.arange(0, BLOCK_R)
            xa_MR = sum_projection(projection, ranks_R, tl.arange(0, TOKENS), M, rank, projection_splits, BLOCK_S)
            xa_MR = xa_MR.to(b_values.dtype.element_ty).to(tl.float32)
            branch_OM = tl.sum(b_OR.to(tl.float32)[:, None, :] * xa_MR[None, :, :], axis=2)
            if TOKENS < BLOCK_M:
                alike: tl.constexpr = BLOCK_M // TOKENS
                branch_OM = branch_OM[:, None, :].broadcast_to(BLOCK_N, alike, TOKENS).reshape(BLOCK_N, BLOCK_M)
            acc_OM += branch_OM
    return acc_OM


@triton.jit
def multiply_ranks(
    acc_OM,
    b_values,  # these five as in `add_ranks`
    projection,
    rows_O,
    first_row,
    split,
    segments,
    M,
    N,
    rank: tl.constexpr,
    own_rank: tl.constexpr,
    splits: tl.constexpr,
    projection_splits: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,  # at least 16
):
    """acc_OM + (x A B)ᵀ by tensor cores, over BLOCK_R ranks in every `splits`-th turn from `split` on."""
    BLOCK_M: tl.constexpr = acc_OM.shape[1]
    own = first_rank_of(segments, first_row, own_rank)
    dtype: tl.constexpr = b_values.dtype.element_ty
    for first in tl.range(split * BLOCK_R, own_rank, splits * BLOCK_R, num_stages=1):
        b_OR = load_ranks(b_values, rows_O, first, N, own_rank, BLOCK_R)
        ranks_R = own + first + tl.arange(0, BLOCK_R)
        rows_M = tl.arange(0, BLOCK_M)
        xa_MR = sum_projection(projection, ranks_R, rows_M, M, rank, projection_splits, BLOCK_S).to(dtype)
        acc_OM = tl.dot(b_OR, tl.trans(xa_MR), acc_OM)
    return acc_OM


@triton.jit
def sum_projection(
    projection,
    ranks_R,
    rows_M,
    M,
    rank: tl.constexpr,
    projection_splits: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """x A of some tokens and ranks, float32 [M, R]: the sum of its partial sums; zero for ranks beyond the last."""
    tokens: tl.constexpr = rows_M.shape[0]
    width: tl.constexpr = ranks_R.shape[0]
    at_once: tl.constexpr = min(BLOCK_S, max(1, PROJECTION_ELEMENTS // (tokens * width)))
    tokens_M = tl.minimum(rows_M, M - 1)
    xa_MR = tl.zeros((tokens, width), tl.float32)
    for first in range(0, projection_splits, at_once):
        splits_S = first + tl.arange(0, at_once)
        place = projection + (splits_S[:, None, None] * M + tokens_M[None, :, None]) * rank + ranks_R[None, None, :]
        inside = (splits_S < projection_splits)[:, None, None] & (ranks_R < rank)[None, None, :]
        xa_MR += tl.sum(tl.load(place, mask=inside, other=0.0), axis=0)
    return xa_MR
