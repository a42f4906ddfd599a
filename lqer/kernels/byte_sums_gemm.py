"""Kernels on trellis codes of table "bytes": the product for few tokens, and dequantization for many.

The product y = W x + b + B(A x) is computed as yᵀ = W xᵀ, with weights computed in registers as bytes of operands of
integer tensor cores (byte_sums.py). A warp computes the rows of some row groups over a span of tiles, and loads the
codes of the next tile while it computes; those of the first before it waits for the kernel that prepares x. K is split
over the warps of a program, and over programs (split_k.py), each of which adds some of the ranks of the branch.

Shapes: M tokens, I in_features, O out_features, R rank (padded), T threads of a program, C columns of a thread.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.branch import add_ranks, load_ranks
from lqer.kernels.byte_sums import (
    TOKENS_AT_ONCE_C,
    add_tile,
    byte_sums,
    joined,
    load_groups,
    load_tokens,
    no_sums,
    plain_product,
    sums_tile,
    uncounted_next,
)
from lqer.kernels.decode import ROWS_C
from lqer.kernels.runtime import INTERPRETED
from lqer.kernels.split_k import finish_tile
from lqer.kernels.trellis_decode import TILE_C


@triton.jit(do_not_specialize=["M", "tiles_n"])
def byte_sums_product_kernel(
    x,  # int8 [M, 2, IP], these two as in byte_sums.py
    steps,  # float32 [M, tiles]
    words,  # as in trellis.py
    scales,  # float32 [OP]
    b_values,  # [own rank, O] in the dtype of the layer, or None
    projection,  # partial sums of x A, float32 [projection_splits, M, RP], or None
    bias,  # [O], or None
    segments,  # int32 [O / 64], see joint.py, or None
    partial,  # float32 [splits, O, M], or None for one split
    finished,  # int32, a counter per output tile, zero before and after
    y,  # [M, O]
    M,
    N,
    tiles_n,
    layout: tl.constexpr,
    rank: tl.constexpr,  # of all segments
    own_rank: tl.constexpr,  # of one
    projection_splits: tl.constexpr,
    BLOCK_S: tl.constexpr,  # projection_splits, as a power of two
    span: tl.constexpr,  # tiles of a warp
    splits: tl.constexpr,
    warps_n: tl.constexpr,
    warps_k: tl.constexpr,
    groups: tl.constexpr,  # row groups of a warp
    early: tl.constexpr,  # tokens are loaded a tile ahead too
    TOKENS: tl.constexpr,  # M, rounded up to a power of two
    BLOCK_R: tl.constexpr,
    pdl: tl.constexpr,
):
    """y of 16 * warps_n * groups rows and four tokens, over one split of K."""
    pid = tl.program_id(0)
    pid_n, pid_s = pid % tiles_n, pid // tiles_n
    BLOCK_N: tl.constexpr = warps_n * groups * ROWS_C
    rows_O = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.arange(0, TOKENS_AT_ONCE_C)
    thread_T = tl.arange(0, warps_n * warps_k * 32)
    lane_T, warp_T = thread_T % 32, thread_T // 32
    if not INTERPRETED:
        # Groups beyond the last row are the last one again; their sums are not stored.
        group_T, last = (pid_n * warps_n + warp_T % warps_n) * groups, (N - 1) // ROWS_C
        tile_T = (pid_s * warps_k + warp_T // warps_n) * span
        # Codes of the last tile stand for those of later ones, whose tokens have steps of zero.
        present_T = tl.minimum(tile_T, layout.tiles - 1)
        codes = load_groups(words, group_T, lane_T, present_T, last, layout, groups)
    first_rank = pid_s * BLOCK_R
    if rank > 0:
        b_OR = load_ranks(b_values, rows_O, first_rank, N, own_rank, BLOCK_R)
    scales_O = tl.load(scales + rows_O, mask=rows_O < N, other=0.0)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    if INTERPRETED:
        acc_OM = tl.zeros((BLOCK_N, TOKENS_AT_ONCE_C), tl.float32)
        for tile in tl.static_range(warps_k * span):
            rows_in_O, now = tl.minimum(rows_O, N - 1), pid_s * warps_k * span + tile
            if now < layout.tiles:
                acc_OM += plain_product(words, x, steps, rows_in_O, rows_M, now, M, layout)
    else:
        sums = no_sums(lane_T, groups)
        if early:
            tokens = load_tokens(x, steps, lane_T, tile_T, M, layout.tiles)
        # The compiler cannot count the turns: unrolled, the loop does not fit the instruction cache.
        turn = 0
        while turn < span:
            # The last turn loads its own codes again.
            following_T = tile_T + tl.minimum(turn + 1, span - 1)
            present_T = tl.minimum(following_T, layout.tiles - 1)
            next_codes = load_groups(words, group_T, lane_T, present_T, last, layout, groups)
            if early:
                next_tokens = load_tokens(x, steps, lane_T, following_T, M, layout.tiles)
                sums = add_tile(sums, codes, tokens, layout, groups)
                tokens = next_tokens
            else:
                tokens = load_tokens(x, steps, lane_T, tile_T + turn, M, layout.tiles)
                sums = add_tile(sums, codes, tokens, layout, groups)
            codes = next_codes
            turn = uncounted_next(turn)
        acc_OM = sums_tile(sums, warps_k, warps_n, groups)
    acc_OM *= scales_O[:, None]
    if rank > 0:
        acc_OM = add_ranks(
            acc_OM, b_OR, b_values, projection, rows_O, pid_n * BLOCK_N, first_rank, segments, M, N, rank, own_rank,
            splits, projection_splits, BLOCK_S, TOKENS, BLOCK_R,
        )  # fmt: skip
    finish_tile(acc_OM, partial, finished + pid_n, pid_s, bias, y, rows_O, rows_M, M, N, splits, splits)


@triton.jit
def byte_sums_dequantize_kernel(
    words,  # as in trellis.py
    scales,  # float32 [OP]
    w_out,  # [O, I]
    N,
    K,
    layout: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Decode a tile of 16 * WARPS rows to memory, scaled in float32. A thread has 16 columns of two rows, twice."""
    thread_T, tile = tl.arange(0, WARPS * 32), tl.program_id(1)
    lane_T, last = thread_T % 32, (N - 1) // ROWS_C
    group_T = tl.program_id(0) * WARPS + thread_T // 32
    codes = load_groups(words, group_T, lane_T, tile, last, layout, 1)
    sums = byte_sums(codes, layout)
    for i in tl.static_range(4):
        half, h = i // 2, i % 2
        row_T = group_T * ROWS_C + lane_T // 4 * 2 + h
        column_T = tile * TILE_C + (half * 4 + lane_T % 4) * 16
        scales_T = tl.load(scales + row_T, mask=row_T < N, other=0.0)
        values_TC = joined(sums[16 * i : 16 * i + 16], 16).to(tl.float32) / 128 * scales_T[:, None]
        place_TC = (row_T.to(tl.int64) * K + column_T)[:, None] + tl.arange(0, 16)[None, :]
        # Columns are multiples of 16.
        inside_TC = ((row_T < N) & (column_T < K))[:, None] & (tl.arange(0, 16) >= 0)[None, :]
        tl.store(w_out + place_TC, values_TC.to(w_out.dtype.element_ty), mask=inside_TC)
