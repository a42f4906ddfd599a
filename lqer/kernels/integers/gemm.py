"""Few tokens: y = W_q x_q + b + Q(Q(x_q A) B) with weights decoded in registers.

The product is computed as yᵀ = W xᵀ, so that decoded weights are the tensor core operand that comes from registers. For
few tokens there are too few output tiles to fill the GPU, so K is split over `splits` programs (split_k.py). The
low-rank branch is one more partial sum of every output tile, computed by its own programs at the same time; they wait
for the projection x_q A, which the first programs of the grid compute (low_rank.py).

Shapes: M tokens, I in_features, O out_features, R rank (padded to whole blocks), T columns of a tile.
"""

import triton
import triton.language as tl

from lqer.kernels.decode import decode_tile, dot, permute_columns, rows_of_x
from lqer.kernels.integers.groups_decode import group_product
from lqer.kernels.integers.groups_wide import wide_product
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.low_rank import await_projection, first_rank_of, load_factor, produce_projection
from lqer.kernels.rounding import round_rows
from lqer.kernels.split_k import finish_tile_of_blocks


@triton.constexpr_function
def is_grouped(layout):
    """Whether the weight is laid out as in layout/groups.py, else as in layout/codes.py."""
    return isinstance(layout, GroupLayout)


# M changes from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x,  # [M, I], rounded if activations are; [M, IP] in kernel order
    x_given,  # [M, I], not rounded
    words,  # these four as in layout/codes.py or layout/groups.py
    high,
    scales,
    zeros,
    bias,  # [O], or None
    a_codes,  # Aᵀ [RP, IP] int8 or plain, or None
    a_exponents,  # [RP, IP / a_block] uint8, or None
    b_codes,  # [own rank, O] int8 or plain, or None
    b_exponents,  # [own rank / b_block, O] uint8, or None
    partial,  # [splits, + 1 with a branch, tiles, BLOCK_N, BLOCK_M] float32, or None for one partial sum
    finished,  # int32, a counter per output tile, zero before and after
    projection_partial,  # [projection_splits, M, RP] float32, or None
    projection,  # Q(x A) [M, RP], or None
    counters,  # int32, of the branch (low_rank.py), zero before and after
    segments,  # int32 [O / 64], see joint.py, or None
    residual,  # [M, O], or None
    y,  # [M, O]
    M,
    N,
    K,
    x_stride,  # between rows of x
    given_stride,
    rank: tl.constexpr,  # of all segments
    own_rank: tl.constexpr,  # of one
    layout: tl.constexpr,  # RowLayout or GroupLayout
    ordered: tl.constexpr,  # x is in kernel order
    rounding: tl.constexpr,  # ActivationRounding
    a_block: tl.constexpr,
    b_block: tl.constexpr,
    padded_columns: tl.constexpr,
    projection_splits: tl.constexpr,
    SPLIT_K: tl.constexpr,  # columns of a split of the projection
    tiles_n: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
    pdl: tl.constexpr,  # only for integer groups without a branch
):
    """By program number: first the splits of Q(x A), then those of W x, then the branch of every output tile."""
    pid = tl.program_id(0)
    if rank > 0:
        producers = projection_splits * (rank // BLOCK_R) * tl.cdiv(M, BLOCK_M)
        if pid < producers:
            produce_projection(
                pid, x_given, a_codes, a_exponents, projection_partial, projection, counters, M, K, given_stride,
                rank, padded_columns, projection_splits, SPLIT_K, BLOCK_M, BLOCK_R, rounding, a_block,
            )  # fmt: skip
            return
        pid -= producers
    pid_n, pid_s, pid_m = pid % tiles_n, pid // tiles_n % splits, pid // (tiles_n * splits)
    products = tiles_n * splits * tl.cdiv(M, BLOCK_M)
    if rank > 0 and pid >= products:
        pid_s, pid_m = splits, (pid - products) // tiles_n
    rows_O = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if rank > 0 and pid >= products:
        await_projection(counters, pid_m, tiles_n, rank // BLOCK_R)
        acc_OM = low_rank_product(
            projection, b_codes, b_exponents, first_rank_of(segments, pid_n * BLOCK_N, own_rank), rows_O, rows_M,
            M, N, x.dtype.element_ty, rank, own_rank, b_block, BLOCK_N, BLOCK_M, BLOCK_R, rounding,
            is_grouped(layout),
        )  # fmt: skip
    else:
        acc_OM = product(
            x, words, high, scales, zeros, pid_n * BLOCK_N, pid_m * BLOCK_M, pid_s, M, N, K, x_stride, None, 1,
            layout, ordered, BLOCK_N, BLOCK_M, splits, stages, pdl,
        )  # fmt: skip

    parts: tl.constexpr = splits + (1 if rank > 0 else 0)
    # So many loads at once that they take about as many registers as the accumulators did.
    tile = pid_m * tiles_n + pid_n
    finish_tile_of_blocks(
        acc_OM, partial, tile, tiles_n * tl.cdiv(M, BLOCK_M), finished + tile, pid_s, bias, residual, y, rows_O, rows_M,
        M, N, parts, max(1, 64 // BLOCK_M),
    )  # fmt: skip


@triton.jit
def product(
    x,
    words,
    high,
    scales,
    zeros,
    first_row,
    first_token,
    pid_s,
    M,
    N,
    K,
    x_stride,
    order,  # of the rows of x, see `rows_of_x`, or None
    fan: tl.constexpr,
    layout: tl.constexpr,
    ordered: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
    pdl: tl.constexpr,  # only for integer groups
):
    """W xᵀ over one split of K, float32 [O, M]."""
    if is_grouped(layout) and ordered:
        return wide_product(
            x, words, scales, zeros, first_row, first_token, pid_s, M, N, x_stride, order, fan,
            layout, BLOCK_N, BLOCK_M, splits, stages, pdl,
        )  # fmt: skip
    elif is_grouped(layout):
        return group_product(
            x, words, scales, zeros, first_row, first_token, pid_s, M, N, x_stride, order, fan,
            layout, BLOCK_N, BLOCK_M, splits, stages, pdl,
        )  # fmt: skip
    else:
        dtype: tl.constexpr = x.dtype.element_ty
        tile_k: tl.constexpr = layout.tile_k
        rows_O, rows_M = first_row + tl.arange(0, BLOCK_N), first_token + tl.arange(0, BLOCK_M)
        columns_T = tl.arange(0, tile_k)
        x_rows = x + rows_of_x(rows_M, M, order, fan).to(tl.int64)[:, None] * x_stride + columns_T[None, :]
        row_inside = (rows_M < M)[:, None]
        acc_OM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for tile in tl.range(pid_s, layout.tiles, splits, num_stages=stages):
            w_OT = decode_tile(words, high, scales, zeros, rows_O, tile, layout, dtype)
            if ordered:
                x_MT = tl.load(x_rows + tile * tile_k, mask=row_inside, other=0.0)
            else:
                inside = row_inside & (tile * tile_k + columns_T < K)[None, :]
                x_MT = permute_columns(tl.load(x_rows + tile * tile_k, mask=inside, other=0.0), tile_k)
            acc_OM = dot(w_OT, tl.trans(x_MT), acc_OM)
        return acc_OM


@triton.jit
def low_rank_product(
    projection,
    b_codes,
    b_exponents,
    first_rank,
    rows_O,
    rows_M,
    M,
    N,
    dtype: tl.constexpr,
    rank: tl.constexpr,
    own_rank: tl.constexpr,
    b_block: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    rounding: tl.constexpr,
    grouped: tl.constexpr,
):
    """Q(Q(x A) B)ᵀ, float32 [O, M]."""
    product_OM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Copied ahead, B would take the shared memory of integer groups.
    for first in tl.range(0, own_rank, BLOCK_R, num_stages=1 if grouped else 3):
        b_RO = load_factor(b_codes, b_exponents, first, rows_O, N, own_rank, BLOCK_R, b_block, dtype)
        xa_place = projection + rows_M[:, None] * rank + first_rank + first + tl.arange(0, BLOCK_R)[None, :]
        xa_MR = tl.load(xa_place, mask=(rows_M < M)[:, None], other=0.0)
        product_OM = dot(tl.trans(b_RO), tl.trans(xa_MR), product_OM)
    if rounding.bits > 0:
        product_OM = round_rows(product_OM, rounding)
    return product_OM
