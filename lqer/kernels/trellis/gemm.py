"""Kernels on trellis codes: the product for few tokens, and dequantization for many.

The product y = W x + b + B(A x) is computed as yᵀ = W xᵀ, with weights decoded in registers as float16 operands of
tensor cores and tokens as float16 with steps (layout/trellis.py). A warp computes 16 rows over a span of tiles. It
loads the codes of several tiles, and decodes the first, before it waits for the kernel that prepares x. K is split over
spans (split_k.py), and every split adds some of the ranks of the branch.

Shapes: M tokens, I in_features, O out_features, R rank (padded), T threads of a program, H rows 2 g and 2 g + 1 of a
thread, E its tokens 2 t and 2 t + 1, C columns.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.branch import add_ranks, load_ranks
from lqer.kernels.decode import ROWS_C
from lqer.kernels.runtime import INTERPRETED
from lqer.kernels.split_k import finish_tile
from lqer.kernels.trellis.decode import (
    TILE_C,
    TOKENS_AT_ONCE_C,
    add_products,
    decode,
    load_tokens,
    load_words,
    no_sums,
    plain_product,
    plain_values,
    share_table,
)


@triton.jit(do_not_specialize=["M"])
def trellis_product_kernel(
    x,  # float16 [M, IP]
    steps,  # float32 [M, tiles]
    words,  # as in layout/trellis.py
    table,
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
    layout: tl.constexpr,
    rank: tl.constexpr,  # of all segments
    own_rank: tl.constexpr,  # of one
    projection_splits: tl.constexpr,
    BLOCK_S: tl.constexpr,  # projection_splits, as a power of two
    span: tl.constexpr,
    splits: tl.constexpr,
    tiles_n: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,  # M, rounded up to a power of two
    BLOCK_R: tl.constexpr,
    pdl: tl.constexpr,
):
    """y of 16 * WARPS rows and BLOCK_M tokens, over one split of K."""
    pid = tl.program_id(0)
    pid_n, pid_s = pid % tiles_n, pid // tiles_n
    BLOCK_N: tl.constexpr = WARPS * ROWS_C
    rows_O = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.arange(0, BLOCK_M)
    thread_T = tl.arange(0, WARPS * 32)
    lane_T = thread_T % 32
    blocks: tl.constexpr = BLOCK_M // TOKENS_AT_ONCE_C
    if not INTERPRETED:
        # Warps beyond the last row repeat the last group; their sums are not stored.
        group_T, first_tile = tl.minimum(pid_n * WARPS + thread_T // 32, (N - 1) // ROWS_C), pid_s * span
        held: tl.constexpr = 2 * layout.bits
        ahead: tl.constexpr = min(span, layout.tiles_ahead)
        loaded = load_words(words, group_T, lane_T, first_tile, layout, ahead)
        shared_T = share_table(table, thread_T, layout)
        weights = decode(loaded[:held], shared_T, layout)
    first_rank = pid_s * BLOCK_R
    if rank > 0:
        b_OR = load_ranks(b_values, rows_O, first_rank, N, own_rank, BLOCK_R)
    scales_O = tl.load(scales + rows_O, mask=rows_O < N, other=0.0)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    if INTERPRETED:
        acc_OM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for tile in tl.static_range(span):
            rows_in_O = tl.minimum(rows_O, N - 1)
            acc_OM += plain_product(words, table, x, steps, rows_in_O, rows_M, pid_s * span + tile, M, layout)
    else:
        sums = no_sums(lane_T, blocks)
        # A loop of one turn keeps Triton's passes from recomputing `sums` in the layout of a later operand, in which
        # element number i does not belong to thread number i.
        turn = 0
        while turn < 1:
            codes = loaded
            tokens = load_tokens(x, steps, lane_T, 0, first_tile, M, layout.tiles, blocks)
            for tile in tl.static_range(span):
                sums = add_products(sums, weights, tokens, blocks)
                if tile + ahead < span:
                    codes = codes + load_words(words, group_T, lane_T, first_tile + tile + ahead, layout, 1)
                if tile + 1 < span:
                    # Tokens arrive while the weights are decoded.
                    tokens = load_tokens(x, steps, lane_T, 0, first_tile + tile + 1, M, layout.tiles, blocks)
                    weights = decode(codes[(tile + 1) * held : (tile + 2) * held], shared_T, layout)
            turn += 1
        # Triton does not know that the table was in use.
        tl.debug_barrier()
        acc_OM = sums_tile(sums, WARPS, blocks)
    acc_OM *= scales_O[:, None]
    if rank > 0:
        acc_OM = add_ranks(
            acc_OM, b_OR, b_values, projection, rows_O, pid_n * BLOCK_N, first_rank, segments, M, N, rank, own_rank,
            splits, projection_splits, BLOCK_S, TOKENS, BLOCK_R,
        )  # fmt: skip
    finish_tile(acc_OM, partial, finished + pid_n, pid_s, bias, None, y, rows_O, rows_M, M, N, splits, splits)


@triton.jit
def sums_tile(sums, WARPS: tl.constexpr, blocks: tl.constexpr):
    """[O, M] from the sums of threads, which hold rows 2 g and 2 g + 1 of a warp and two of each eight tokens."""
    if blocks == 1:
        sum_THE = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
        return sum_THE.reshape(WARPS, 8, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(WARPS * 16, 8)
    else:
        half: tl.constexpr = blocks // 2
        one, other = sums_tile(sums[: 4 * half], WARPS, half), sums_tile(sums[4 * half :], WARPS, half)
        return tl.join(one, other).permute(0, 2, 1).reshape(WARPS * 16, 8 * blocks)


@triton.jit
def trellis_dequantize_kernel(
    words,  # as in layout/trellis.py
    table,
    scales,  # float32 [OP]
    w_out,  # [O, I]
    N,
    K,
    layout: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Decode one tile of BLOCK_N rows to memory, scaled in float32."""
    rows_O = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_C = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    values_OC = plain_values(words, table, rows_O, columns_C, layout) * tl.load(scales + rows_O)[:, None]
    place = w_out + rows_O.to(tl.int64)[:, None] * K + columns_C[None, :]
    tl.store(place, values_OC.to(w_out.dtype.element_ty), mask=(rows_O < N)[:, None] & (columns_C < K)[None, :])
