"""The kernel for up to 64 tokens on trellis codes of table "bytes".

The product y = W x + B(A x) is computed as yᵀ = W xᵀ. A program has a span of columns and some row groups, one after
the other; its warps share out the columns, and hold their tokens in registers all the while (resident.py). There are
about as many programs as multiprocessors, each with as many row groups as the others, so all end at about the same
time; a few multiprocessors are left for the programs that rotate tokens. Where tokens of all columns do not fit the
registers of a program, others have the rest, and what reads y adds their sums.

Shapes: M tokens, I in_features, O out_features, R rank (padded), T threads of a program, E elements of its row groups.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.branch import load_ranks, sum_projection
from lqer.kernels.decode import ROWS_C
from lqer.kernels.fetch import fetch_tiles
from lqer.kernels.halves import TOKENS_AT_ONCE_C
from lqer.kernels.halves import plain_product as plain_halves
from lqer.kernels.low_rank import first_rank_of
from lqer.kernels.runtime import INTERPRETED
from lqer.kernels.trellis.byte_sums import plain_product as plain_integers
from lqer.kernels.trellis.byte_sums import uncounted_next
from lqer.kernels.trellis.decode import load_words
from lqer.kernels.trellis.resident import (
    add_warps,
    leave_halves,
    leave_integers,
    load_halves,
    load_integers,
    multiply_halves,
    multiply_integers,
    reserve,
    what_follows,
)

# Row groups whose codes are fetched ahead.
AHEAD = tl.constexpr(4)


@triton.jit
def in_rows(sums_E, at_once: tl.constexpr, BLOCK_M: tl.constexpr, integers: tl.constexpr):
    """[O, M] of the sums of row groups, in the order in which lanes leave them."""
    if integers:
        # Row group, g, t, h.
        sums_OM = sums_E.reshape(at_once, 8, BLOCK_M, 2).permute(0, 1, 3, 2)
    else:
        # Row group, block of tokens, g, t, h, e.
        sums_OM = sums_E.reshape(at_once, BLOCK_M // TOKENS_AT_ONCE_C, 8, 4, 2, 2).permute(0, 2, 4, 1, 3, 5)
    return sums_OM.reshape(at_once * ROWS_C, BLOCK_M)


@triton.jit
def add_branch(acc_OM, b_OR, xa_MR, integers: tl.constexpr):
    """acc_OM + (x A B)ᵀ over some ranks."""
    rounded_MR = xa_MR.to(b_OR.dtype)
    if integers:
        return acc_OM + tl.sum(b_OR.to(tl.float32)[:, None, :] * rounded_MR.to(tl.float32)[None, :, :], axis=2)
    else:
        return tl.dot(b_OR, tl.trans(rounded_MR), acc_OM)


@triton.jit(do_not_specialize=["M", "N", "tiles_n", "per_program"])
def resident_product_kernel(
    x,  # as in byte_sums.py for integers, else as in halves.py, and so
    steps,
    words,  # as in layout/trellis.py
    scales,  # float32 [OP]
    b_values,  # [own rank, O] in the dtype of the layer, or None
    projection,  # partial sums of x A, float32 [projection_splits, M, RP], or None
    segments,  # int32 [O / 64], see joint.py, or None
    y,  # float32 [splits, M, O]
    M,
    N,
    tiles_n,  # programs along the rows
    per_program,  # row groups
    layout: tl.constexpr,
    rank: tl.constexpr,  # of all segments
    own_rank: tl.constexpr,  # of one
    projection_splits: tl.constexpr,
    BLOCK_S: tl.constexpr,  # projection_splits, as a power of two
    BLOCK_R: tl.constexpr,  # ranks that are added at once
    integers: tl.constexpr,  # tokens are 16-bit integers instead of float16
    span: tl.constexpr,  # tiles of a program
    tiles: tl.constexpr,  # of a warp
    at_once: tl.constexpr,  # row groups whose sums are added together
    buffers: tl.constexpr,  # of these sums: with two, warps may go on while others read
    warps: tl.constexpr,
    BLOCK_M: tl.constexpr,
    pdl: tl.constexpr,
):
    """y of some row groups and BLOCK_M tokens, over one span of tiles."""
    pid_n, split = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    first_token = tl.program_id(1) * BLOCK_M
    rows_M = first_token + tl.arange(0, BLOCK_M)
    group = pid_n * per_program
    end = tl.minimum(group + per_program, tl.cdiv(N, ROWS_C))
    first_tile = split * span
    end_tile = tl.minimum(first_tile + span, layout.tiles)
    E: tl.constexpr = ROWS_C * BLOCK_M
    BLOCK_O: tl.constexpr = at_once * ROWS_C
    blocks: tl.constexpr = max(1, BLOCK_M // TOKENS_AT_ONCE_C)
    if not INTERPRETED:
        thread_T = tl.arange(0, warps * 32)
        lane_T, warp_T = thread_T % 32, thread_T // 32
        wanted_T = first_tile + warp_T * tiles
        # The last warp's tiles end where those of the weight do; what others have too has tokens of zero.
        tile_T = tl.minimum(wanted_T, layout.tiles - tiles)
        codes = load_words(words, tl.minimum(group, end - 1), lane_T, tile_T, layout, tiles)
        for later in tl.static_range(1, AHEAD):
            later_group = group + later
            fetch_tiles(words, later_group, later_group < end, first_tile, end_tile, layout.tiles, layout.bits)
        room = reserve(buffers * at_once * warps * E * 4)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    if not INTERPRETED:
        if integers:
            tokens = load_integers(x, steps, lane_T, tile_T, wanted_T, end_tile, M, layout, tiles)
            # Lanes of tokens that there are not leave nothing.
            place_T = room + 4 * (warp_T * E + (lane_T // 4 * BLOCK_M + lane_T % 4) * 2)
        else:
            first_block = first_token // TOKENS_AT_ONCE_C
            tokens = load_halves(x, lane_T, first_block, tile_T, wanted_T, end_tile, layout, tiles, blocks)
            others = what_follows(tokens, lane_T, tiles, blocks)
            place_T = room + 4 * (warp_T * E + lane_T * 4)
        sum_E = tl.arange(0, at_once * E)
        places_E = room + 4 * (sum_E // E * (warps * E) + sum_E % E)
        buffer = 0
    # Steps of integers are those of sums, and float16 values are in units of 1 / 128.
    unit: tl.constexpr = 1.0 if integers or INTERPRETED else 1 / 128
    if not integers:
        steps_M = tl.load(steps + tl.minimum(rows_M, M - 1))
    if rank > 0:
        held = -1
        xa_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    while group < end:
        rows_O = group * ROWS_C + tl.arange(0, BLOCK_O)
        inside_O = rows_O < tl.minimum(end * ROWS_C, N)
        scales_O = tl.load(scales + rows_O, mask=inside_O, other=0.0) * unit
        if rank > 0:
            b_OR = load_ranks(b_values, rows_O, 0, N, own_rank, BLOCK_R)
        if INTERPRETED:
            sums_OM = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
            rows_in_O = tl.minimum(rows_O, N - 1)
            for tile in range(first_tile, end_tile):
                if integers:
                    sums_OM += plain_integers(words, x, steps, rows_in_O, rows_M, tile, M, layout)
                else:
                    sums_OM += plain_halves(words, None, x, rows_in_O, rows_M, tile, M, layout)
        else:
            slot = 0
            while slot < tl.minimum(at_once, end - group):
                # The last turn loads its own codes again.
                following = tl.minimum(group + slot + 1, end - 1)
                next_codes = load_words(words, following, lane_T, tile_T, layout, tiles)
                later_group = group + slot + AHEAD
                fetch_tiles(words, later_group, later_group < end, first_tile, end_tile, layout.tiles, layout.bits)
                left_T = place_T + (buffer + slot) * (4 * warps * E)
                if integers:
                    sums = multiply_integers(codes, tokens, layout, tiles)
                    leave_integers(sums, left_T, lane_T % 4 < BLOCK_M)
                else:
                    sums = multiply_halves(codes, tokens, others, layout, tiles, blocks)
                    leave_halves(sums, left_T, 4 * blocks)
                codes = next_codes
                slot = uncounted_next(slot)
            tl.debug_barrier()
            left_E = places_E + buffer * (4 * warps * E)
            sums_OM = in_rows(add_warps(left_E, warps, 4 * E), at_once, BLOCK_M, integers)
            if buffers == 1:
                # All must have been read before the next ones are stored.
                tl.debug_barrier()
            else:
                # They have been when the barrier after the next ones opens.
                buffer = at_once - buffer
        acc_OM = sums_OM * scales_O[:, None]
        if not integers:
            acc_OM *= steps_M[None, :]
        if rank > 0:
            if split == 0:
                own = first_rank_of(segments, group * ROWS_C, own_rank)
                if own != held:
                    ranks_R = own + tl.arange(0, BLOCK_R)
                    xa_MR = sum_projection(projection, ranks_R, rows_M, M, rank, projection_splits, BLOCK_S)
                    held = own
                acc_OM = add_branch(acc_OM, b_OR, xa_MR, integers)
                for first in tl.range(BLOCK_R, own_rank, BLOCK_R, num_stages=1):
                    ranks_R = own + first + tl.arange(0, BLOCK_R)
                    more_MR = sum_projection(projection, ranks_R, rows_M, M, rank, projection_splits, BLOCK_S)
                    more_OR = load_ranks(b_values, rows_O, first, N, own_rank, BLOCK_R)
                    acc_OM = add_branch(acc_OM, more_OR, more_MR, integers)
        place_OM = (split * M + rows_M)[None, :].to(tl.int64) * N + rows_O[:, None]
        tl.store(y + place_OM, acc_OM, mask=inside_O[:, None] & (rows_M < M)[None, :])
        group += at_once
