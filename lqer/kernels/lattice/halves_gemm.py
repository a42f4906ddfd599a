"""The kernel for 5 to 32 tokens on lattice codes.

The product y = W x + b + B(A x) is computed as yᵀ = W xᵀ, with weights decoded in registers as operands of float16
tensor cores (halves.py). A warp computes the rows of some row groups over a span of tiles, and loads the codes
of the next tile while it computes; those of the first before it waits for the kernel that prepares x, and the program
has all of them fetched to the L2 cache then. Warps of a program along the rows read the same tokens at about the same
time, so these come from the L1 cache. K is split over the warps of a program, and over programs (split_k.py), each of
which adds some of the ranks of the branch.

Shapes: M tokens, I in_features, O out_features, R rank (padded), T threads of a program.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.branch import multiply_ranks
from lqer.kernels.decode import ROWS_C
from lqer.kernels.fetch import fetch_tiles
from lqer.kernels.halves import TOKENS_AT_ONCE_C, plain_product
from lqer.kernels.lattice.decode import COPIES_C, share_table
from lqer.kernels.lattice.halves import UNIT, add_tile, load_groups_of_units, no_sums, sums_tile
from lqer.kernels.runtime import INTERPRETED
from lqer.kernels.split_k import finish_tile
from lqer.kernels.trellis.byte_sums import uncounted_next

# Registers of a thread for partial sums that it loads at once.
PARTIAL_REGISTERS = tl.constexpr(64)


@triton.constexpr_function
def partials_at_once(splits: int, most: int) -> int:
    return max(1, min(splits, most))


@triton.jit(do_not_specialize=["M", "tiles_n"])
def lattice_halves_kernel(
    x,  # float16, these two as in halves.py
    steps,
    units,  # these two as in layout/lattice.py
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
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    pdl: tl.constexpr,
):
    """y of 16 * warps_n * groups rows and BLOCK_M tokens, over one split of K."""
    pid = tl.program_id(0)
    pid_n, pid_s = pid % tiles_n, pid // tiles_n
    BLOCK_N: tl.constexpr = warps_n * groups * ROWS_C
    rows_O = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.arange(0, BLOCK_M)
    thread_T = tl.arange(0, warps_n * warps_k * 32)
    lane_T, warp_T = thread_T % 32, thread_T // 32
    blocks: tl.constexpr = BLOCK_M // TOKENS_AT_ONCE_C
    if not INTERPRETED:
        # Groups beyond the last row are the last one again; their sums are not stored.
        group_T, last = (pid_n * warps_n + warp_T % warps_n) * groups, (N - 1) // ROWS_C
        tile_T = (pid_s * warps_k + warp_T // warps_n) * span
        codes = load_groups_of_units(units, group_T, lane_T, tile_T, last, layout.tiles, groups)
        first, end = pid_s * (warps_k * span), (pid_s + 1) * (warps_k * span)
        for q in tl.static_range(groups * warps_n):
            group = pid_n * (groups * warps_n) + q
            fetch_tiles(units, group, group <= last, first, end, layout.tiles, 2)
        copy_T = share_table(table, warps_n * warps_k) + lane_T % COPIES_C * 4
    scales_O = tl.load(scales + rows_O, mask=rows_O < N, other=0.0) * UNIT
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    if INTERPRETED:
        acc_OM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for tile in tl.static_range(warps_k * span):
            rows_in_O, now = tl.minimum(rows_O, N - 1), pid_s * warps_k * span + tile
            acc_OM += plain_product(units, table, x, rows_in_O, rows_M, now, M, layout)
    else:
        sums = no_sums(lane_T, groups * blocks)
        # The compiler cannot count the turns: unrolled, the loop does not fit the instruction cache.
        turn = 0
        while turn < span:
            # The last turn loads its own codes again.
            following_T = tile_T + tl.minimum(turn + 1, span - 1)
            next_codes = load_groups_of_units(units, group_T, lane_T, following_T, last, layout.tiles, groups)
            sums = add_tile(sums, codes, x, lane_T, tile_T + turn, copy_T, layout.tiles, groups, blocks)
            codes = next_codes
            turn = uncounted_next(turn)
        acc_OM = sums_tile(sums, warps_k, warps_n, groups, blocks)
    steps_M = tl.load(steps + tl.minimum(rows_M, M - 1))
    acc_OM *= scales_O[:, None] * steps_M[None, :]
    if rank > 0:
        acc_OM = multiply_ranks(
            acc_OM, b_values, projection, rows_O, pid_n * BLOCK_N, pid_s, segments, M, N, rank, own_rank, splits,
            projection_splits, BLOCK_S, BLOCK_R,
        )  # fmt: skip
    at_once: tl.constexpr = partials_at_once(splits, warps_k * 32 * PARTIAL_REGISTERS // (groups * ROWS_C * BLOCK_M))
    finish_tile(acc_OM, partial, finished + pid_n, pid_s, bias, None, y, rows_O, rows_M, M, N, splits, at_once)
