"""Kernels on lattice codes: the product for few tokens, and dequantization for many.

The product y = W x + b + B(A x) is computed as yᵀ = W xᵀ, with weights decoded in registers and tokens as two-byte
integers (layout/lattice.py). A warp computes 16 rows over a span of tiles. It loads all of its codes before it waits
for the kernel that prepares x, so that memory is busy while that kernel runs. K is split over spans (split_k.py), and
every split adds some of the ranks of the branch.

Shapes: M tokens, I in_features, O out_features, R rank (padded), T threads of a program, H rows g and g + 8
of a thread, U units of a row in a tile, S partial sums of x A.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.branch import add_ranks, load_ranks
from lqer.kernels.decode import ROWS_C
from lqer.kernels.lattice.decode import (
    COPIES_C,
    TILE_C,
    TOKENS_AT_ONCE_C,
    UNITS_C,
    add_products,
    load_units,
    nibble_values,
    plain_product,
    share_table,
    token_places,
    unit_places,
    unit_word,
)
from lqer.kernels.runtime import INTERPRETED
from lqer.kernels.split_k import finish_tile


@triton.jit(do_not_specialize=["M"])
def lattice_product_kernel(
    x,  # int8 [M, 2, IP] in token order
    steps,  # int32 [M, tiles, 2]: the bits of the float32 step / 32, and -120 times the sum of a tile's integers
    units,  # these three as in layout/lattice.py
    table,
    scales,
    b_values,  # [own rank, O] in the dtype of the layer, or None
    projection,  # partial sums of x A, float32 [projection_splits, M, RP], or None
    bias,  # [O], or None
    segments,  # int32 [O / 64], see joint.py, or None
    partial,  # float32 [splits, O, M], or None for one split
    finished,  # int32, a counter per output tile, zero before and after
    y,  # [M, O]
    M,
    N,
    rank: tl.constexpr,  # of all segments
    own_rank: tl.constexpr,  # of one
    projection_splits: tl.constexpr,
    BLOCK_S: tl.constexpr,  # projection_splits, as a power of two
    tiles: tl.constexpr,
    span: tl.constexpr,
    splits: tl.constexpr,
    tiles_n: tl.constexpr,
    WARPS: tl.constexpr,
    TOKENS: tl.constexpr,  # M, rounded up to a power of two
    BLOCK_R: tl.constexpr,
    pdl: tl.constexpr,
):
    """y of 16 * WARPS rows and four tokens, over one split of K."""
    pid = tl.program_id(0)
    pid_n, pid_s = pid % tiles_n, pid // tiles_n
    BLOCK_N: tl.constexpr = WARPS * ROWS_C
    rows_O = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.arange(0, TOKENS_AT_ONCE_C)
    thread_T = tl.arange(0, WARPS * 32)
    lane_T = thread_T % 32
    if not INTERPRETED:
        loaded = load_units(units, pid_n * WARPS + thread_T // 32, lane_T, pid_s * span, tiles, span)
        copy_T = share_table(table, WARPS) + lane_T % COPIES_C * 4
    first_rank = pid_s * BLOCK_R
    if rank > 0:
        b_OR = load_ranks(b_values, rows_O, first_rank, N, own_rank, BLOCK_R)
    scales_O = tl.load(scales + rows_O)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    if INTERPRETED:
        acc_OM = tl.zeros((BLOCK_N, TOKENS_AT_ONCE_C), tl.float32)
        for tile in tl.static_range(span):
            units_OU = tl.load(unit_places(units, rows_O, pid_s * span + tile, tiles))
            acc_OM += plain_product(units_OU, table, x, steps, rows_M, pid_s * span + tile, M, tiles)
    else:
        places = token_places(x, steps, lane_T, pid_s * span, M, tiles)
        zero_T = tl.zeros((WARPS * 32,), tl.float32)
        sums = zero_T, zero_T
        # A loop of one turn keeps Triton's passes from recomputing `sums` in the layout of a later operand, in which
        # element number i does not belong to thread number i.
        turn = 0
        while turn < 1:
            for tile in tl.static_range(span):
                pair = loaded[2 * tile], loaded[2 * tile + 1]
                sums = add_products(sums, pair, copy_T, places, tile)
            turn += 1
        acc_OM = sums_tile(sums, WARPS)
    acc_OM *= scales_O[:, None]
    if rank > 0:
        acc_OM = add_ranks(
            acc_OM, b_OR, b_values, projection, rows_O, pid_n * BLOCK_N, first_rank, segments, M, N, rank, own_rank,
            splits, projection_splits, BLOCK_S, TOKENS, BLOCK_R,
        )  # fmt: skip
    finish_tile(acc_OM, partial, finished + pid_n, pid_s, bias, None, y, rows_O, rows_M, M, N, splits, splits)


@triton.jit
def sums_tile(sums, WARPS: tl.constexpr):
    """[O, M] from the sums of threads, which hold rows g and g + 8 of a warp and one of four tokens."""
    sum_TH = tl.join(sums[0], sums[1])
    return sum_TH.reshape(WARPS, 8, 4, 2).permute(0, 3, 1, 2).reshape(WARPS * 16, TOKENS_AT_ONCE_C)


@triton.jit
def lattice_dequantize_kernel(
    units,  # these three as in layout/lattice.py
    table,
    scales,
    w_out,  # [O, I]
    N,
    K,
    tiles: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Decode one tile of BLOCK_N rows to memory, scaled in float32, columns in natural order."""
    rows_O = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    units_OU = tl.load(unit_places(units, rows_O, tile, tiles))
    scales_O = tl.load(scales + rows_O)
    k = tl.arange(0, 8)
    for c in tl.static_range(4):
        points = nibble_values(unit_word(units_OU, table, c)[:, :, None], k[None, None, :], tl.float32)
        values = (points * scales_O[:, None, None]).to(w_out.dtype.element_ty)
        columns = tile * TILE_C + ((4 * tl.arange(0, UNITS_C) + c) * 8)[None, :, None] + k[None, None, :]
        place = w_out + rows_O.to(tl.int64)[:, None, None] * K + columns
        tl.store(place, values, mask=(rows_O < N)[:, None, None] & (columns < K))
