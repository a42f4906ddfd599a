"""Device functions that multiply integer groups with tokens (layout/groups.py): on a GPU, by the PTX of groups_ptx.py.

A warp multiplies strips of one, two or four row groups with tokens. In Triton's interpreter the same is computed in
plain operations.

Shapes: M tokens, O rows of W, C columns of a strip, T threads of a program, H rows g and g + 8 of a thread, E its
tokens 2 t and 2 t + 1. What `strip_places`, `token_places`, `no_sums` and `add_products` return are tuples of tensors.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, num_warps

from lqer.kernels.decode import ROWS_C, rows_of_x
from lqer.kernels.integers.groups_ptx import (
    fetch_asm,
    fetch_constraints,
    parts_of_strip,
    product_asm,
    product_constraints,
    reads_zeros,
    reserve_asm,
    slot_bytes,
    slots,
    token_registers,
    tokens_asm,
    tokens_constraints,
)
from lqer.kernels.layout.codes import ROW_PADDING
from lqer.kernels.layout.groups import LANES, STRIP
from lqer.kernels.runtime import INTERPRETED

STRIP_C, LANES_C, ROW_PADDING_C = tl.constexpr(STRIP), tl.constexpr(LANES), tl.constexpr(ROW_PADDING)
# A tensor core multiplies eight columns: tokens.
TOKENS_AT_ONCE = 8
TOKENS_AT_ONCE_C = tl.constexpr(TOKENS_AT_ONCE)


@triton.constexpr_function
def types(dtype: tl.dtype, count: int) -> tuple[tl.dtype, ...]:
    return (dtype,) * count


@triton.jit
def reserve(thread_T, size: tl.constexpr):
    """The address of so many bytes of shared memory [T], of which Triton does not know."""
    return tl.inline_asm_elementwise(reserve_asm(size), "=r,r", [thread_T], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def strip_places(words, scales, zeros, group_T, lane_T, strip_T, layout: tl.constexpr):
    """Addresses of a lane's codes, scales and zero points of a strip; without zero points if there are none."""
    unit_T = (group_T * layout.units + strip_T // layout.strips_per_unit) * 8 + lane_T // 4
    word_T = words + (group_T * layout.strips + strip_T) * (4 * LANES_C * layout.bits) + lane_T * 4
    scale_T = scales + unit_T * (2 * layout.groups)
    if layout.symmetric:
        return word_T.to(tl.int64), scale_T.to(tl.int64)
    else:
        return word_T.to(tl.int64), scale_T.to(tl.int64), (zeros + unit_T * (2 * layout.groups)).to(tl.int64)


@triton.jit
def fetch(places_T, slot_T, inside_T, layout: tl.constexpr, rows: tl.constexpr):
    """Start to copy a strip from `strip_places` to its slot; zeros instead if it is not inside."""
    if reads_zeros(layout):
        sources = places_T[:2]
    else:
        sources = places_T
    return tl.inline_asm_elementwise(
        fetch_asm(layout, rows), fetch_constraints(len(sources)), (slot_T, inside_T.to(tl.int32)) + sources,  # noqa: RUF005
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def no_sums(lane_T, count: tl.constexpr):
    """Initial sums of `add_products`: four zeros per thread for each row group and eight tokens, a power of two."""
    if count == 1:
        zero_T = tl.zeros(lane_T.shape, tl.float32)
        return zero_T, zero_T, zero_T, zero_T
    else:
        half = no_sums(lane_T, count // 2)
        return half + half


@triton.jit
def token_places(x, x_stride, lane_T, first, M, order, fan: tl.constexpr, blocks: tl.constexpr):
    """For each eight tokens from `first` on, where a thread reads; the last token instead of later ones."""
    if blocks == 1:
        token_T = rows_of_x(tl.minimum(first + lane_T // 4, M - 1), M, order, fan).to(tl.int64)
        return ((x + token_T * x_stride + lane_T % 4 * 8).to(tl.int64),)
    else:
        half: tl.constexpr = blocks // 2
        others = token_places(x, x_stride, lane_T, first + half * TOKENS_AT_ONCE_C, M, order, fan, half)
        return token_places(x, x_stride, lane_T, first, M, order, fan, half) + others


@triton.jit
def load_tokens(
    tokens_T,  # `token_places` in strip 0
    inside_T,  # whether a thread reads a token of the first eight
    strip_T,
    part: tl.constexpr,
    blocks: tl.constexpr,
):
    """What `add_products` needs of the tokens of a part of a strip: of eight tokens it reads them itself."""
    if blocks == 1:
        return tokens_T[0] + strip_T * (2 * STRIP_C), inside_T.to(tl.int32)
    else:
        at: tl.constexpr = 2 * STRIP_C // parts_of_strip(blocks) * part
        places = tokens_T[:0]
        for i in tl.static_range(blocks):
            places = places + (tokens_T[i] + (strip_T * (2 * STRIP_C) + at),)  # noqa: RUF005
        return tl.inline_asm_elementwise(
            tokens_asm(blocks), tokens_constraints(blocks), places,
            dtype=types(tl.int32, token_registers(blocks)), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def add_products(
    sums,
    slot_T,
    tokens,  # `load_tokens` of the part
    places_T,  # `strip_places` of the strip
    part: tl.constexpr,
    layout: tl.constexpr,
    rows: tl.constexpr,
    blocks: tl.constexpr,
    ahead: tl.constexpr,
    bfloat: tl.constexpr,
):
    """`sums` + the products of a part of a strip, of which `ahead` later ones may be on their way."""
    arguments = sums + (slot_T,) + tokens  # noqa: RUF005
    if reads_zeros(layout):
        arguments = arguments + places_T[2:]
    return tl.inline_asm_elementwise(
        product_asm(layout, rows, blocks, ahead, bfloat, part), product_constraints(layout, rows, blocks), arguments,
        dtype=types(tl.float32, 4 * rows * blocks), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def sums_tile(sums, WARPS: tl.constexpr, rows: tl.constexpr, blocks: tl.constexpr):
    """[O, M] from the sums of threads, which hold rows g and g + 8 of a row group and two of each eight tokens."""
    half: tl.constexpr = len(sums) // 2
    if rows > 1:
        one = sums_tile(sums[:half], WARPS, rows // 2, blocks)
        other = sums_tile(sums[half:], WARPS, rows // 2, blocks)
        parts = tl.join(one, other).reshape(WARPS, 8 * rows, 8 * blocks, 2)
        return parts.permute(0, 3, 1, 2).reshape(WARPS * 16 * rows, 8 * blocks)
    elif blocks > 1:
        one, other = sums_tile(sums[:half], WARPS, 1, blocks // 2), sums_tile(sums[half:], WARPS, 1, blocks // 2)
        return tl.join(one, other).permute(0, 2, 1).reshape(WARPS * 16, 8 * blocks)
    else:
        sum_THE = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
        return sum_THE.reshape(WARPS, 8, 4, 2, 2).permute(0, 3, 1, 2, 4).reshape(WARPS * 16, 8)


@triton.jit
def plain_values(words, scales, zeros, rows_O, strip, layout: tl.constexpr):
    """Values of a strip's columns [O, C], float32, in plain operations.

    The axes of a column are half of the strip, step, t, pair p, and odd; one word is loaded for several columns.
    """
    rows: tl.constexpr = rows_O.shape[0]
    row, group = (rows_O % ROWS_C).reshape(rows, 1, 1, 1, 1, 1), (rows_O // ROWS_C).reshape(rows, 1, 1, 1, 1, 1)
    half, step = tl.arange(0, 2).reshape(1, 2, 1, 1, 1, 1), tl.arange(0, 4).reshape(1, 1, 4, 1, 1, 1)
    t, p = tl.arange(0, 4).reshape(1, 1, 1, 4, 1, 1), tl.arange(0, 4).reshape(1, 1, 1, 1, 4, 1)
    place_of_odd = 16 * tl.arange(0, 2).reshape(1, 1, 1, 1, 1, 2)
    lane = words + (group * layout.strips + strip) * (4 * LANES_C * layout.bits) + (row % 8 * 4 + t) * 4
    first = (half * 2 + row // 8) * layout.bits
    if layout.bits == 3:
        pair = step * 4 + p
        last = pair == 15
        word, place = tl.where(last, 0, pair // 5), tl.where(last, 15, pair % 5 * 3)
        codes = (_word(lane, first + word) >> (place + place_of_odd)) & tl.where(last, 1, 7)
        for n in tl.static_range(1, 3):
            codes |= tl.where(last, ((_word(lane, first + n) >> (15 + place_of_odd)) & 1) << n, 0)
    else:
        digit: tl.constexpr = min(layout.bits, 4)
        word, place = step * digit // 4, step * (4 * digit) % 16 + p * digit + place_of_odd
        codes = (_word(lane, first + word) >> place) & ((1 << digit) - 1)
        if layout.bits == 8:
            codes |= ((_word(lane, first + 4 + word) >> place) & 15) << 4
    groups: tl.constexpr = layout.groups
    unit_O1 = ((rows_O // ROWS_C * layout.units + strip // layout.strips_per_unit) * 8 + rows_O % 8)[:, None]
    scale_OG = (unit_O1 * groups + tl.arange(0, groups)[None, :]) * 2 + (rows_O % ROWS_C // 8)[:, None]
    codes_OGg = codes.reshape(rows, groups, STRIP_C // groups)
    if layout.symmetric:
        codes_OGg -= layout.offset
    else:
        codes_OGg -= tl.load(zeros + scale_OG).to(tl.int32)[:, :, None]
    return (codes_OGg.to(tl.float32) * tl.load(scales + scale_OG).to(tl.float32)[:, :, None]).reshape(rows, STRIP_C)


@triton.jit
def _word(lane, word):
    """Word number `word` of a lane's part of a strip."""
    return tl.load(lane + word // 4 * (4 * LANES_C) + word % 4)


@triton.jit
def group_product(
    x,
    words,
    scales,
    zeros,
    first_row,
    first_token,
    pid_s,
    M,
    N,
    x_stride,
    order,  # of the rows of x, see `rows_of_x`, or None
    fan: tl.constexpr,
    layout: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
    pdl: tl.constexpr,
):
    """W xᵀ over the strips of one split, float32 [O, M]; the first strips are copied before the kernel before ends."""
    first, end = pid_s * layout.strips // splits, (pid_s + 1) * layout.strips // splits
    if INTERPRETED:
        rows_O, rows_M = first_row + tl.arange(0, BLOCK_N), first_token + tl.arange(0, BLOCK_M)
        acc_OM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for strip in range(first, end):
            values_OC = plain_values(words, scales, zeros, tl.minimum(rows_O, N - 1), strip, layout)
            columns_C = strip * STRIP_C + tl.arange(0, STRIP_C)
            rows_x_M = rows_of_x(tl.minimum(rows_M, M - 1), M, order, fan).to(tl.int64)
            place = x + rows_x_M[None, :] * x_stride + columns_C[:, None]
            acc_OM = tl.dot(values_OC, tl.load(place).to(tl.float32), acc_OM)
        return acc_OM
    else:
        WARPS: tl.constexpr = num_warps()
        rows: tl.constexpr = max(1, BLOCK_N // (WARPS * ROWS_C))
        # Warps that share their rows take turns at the strips.
        sharing: tl.constexpr = max(1, WARPS * ROWS_C // BLOCK_N)
        blocks: tl.constexpr = BLOCK_M // TOKENS_AT_ONCE_C
        parts: tl.constexpr = parts_of_strip(blocks)
        bfloat: tl.constexpr = x.dtype.element_ty == tl.bfloat16
        size: tl.constexpr = slot_bytes(layout, rows)
        count: tl.constexpr = slots(layout, BLOCK_N, BLOCK_M, WARPS, stages)
        tl.static_assert(count > 0, "the strips of a launch need more shared memory than there is")
        thread_T = tl.arange(0, WARPS * LANES_C)
        lane_T, warp_T = thread_T % LANES_C, thread_T // LANES_C
        # Warps beyond the last row repeat the last row groups; their sums are not stored.
        last = tl.cdiv(N, ROW_PADDING_C) * (ROW_PADDING_C // ROWS_C) - rows
        group_T = tl.minimum(first_row // ROWS_C + warp_T // sharing * rows, last)
        strip_T = first + warp_T % sharing
        slots_T = reserve(thread_T, WARPS * count * size) + warp_T * (count * size)
        for n in tl.static_range(count):
            ahead_T = strip_T + n * sharing
            places_T = strip_places(words, scales, zeros, group_T, lane_T, ahead_T, layout)
            fetch(places_T, slots_T + n * size, ahead_T < end, layout, rows)
        if pdl:
            gdc_wait()
            gdc_launch_dependents()
        tokens_T = token_places(x, x_stride, lane_T, first_token, M, order, fan, blocks)
        sums = no_sums(lane_T, rows * blocks)
        # A number of turns that the compiler does not know: unrolled, the loop does not fit the instruction cache.
        turns = tl.cdiv(end - first, sharing)
        turns = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [turns], dtype=tl.int32, is_pure=False, pack=1)
        turn, slot = 0, 0
        reads_T = first_token + lane_T // 4 < M
        tokens = load_tokens(tokens_T, reads_T, tl.minimum(strip_T, layout.strips - 1), 0, blocks)
        while turn < turns:
            slot_T = slots_T + slot * size
            # A strip beyond the last has scales of zero.
            present_T = tl.minimum(strip_T, layout.strips - 1)
            following_T = tl.minimum(strip_T + sharing, layout.strips - 1)
            places_T = strip_places(words, scales, zeros, group_T, lane_T, present_T, layout)
            for part in tl.static_range(parts):
                # Tokens are loaded a part ahead; the last turn loads some in vain.
                if part + 1 < parts:
                    next_tokens = load_tokens(tokens_T, reads_T, present_T, part + 1, blocks)
                else:
                    next_tokens = load_tokens(tokens_T, reads_T, following_T, 0, blocks)
                sums = add_products(sums, slot_T, tokens, places_T, part, layout, rows, blocks, count - 1, bfloat)
                tokens = next_tokens
            ahead_T = strip_T + count * sharing
            places_T = strip_places(words, scales, zeros, group_T, lane_T, ahead_T, layout)
            fetch(places_T, slot_T, ahead_T < end, layout, rows)
            strip_T += sharing
            turn += 1
            slot = tl.where(slot + 1 < count, slot + 1, 0)
        tile_OM = sums_tile(sums, WARPS, rows, blocks)
        if sharing > 1:
            tile_OM = tile_OM.reshape(WARPS // sharing, sharing, ROWS_C, BLOCK_M)
            tile_OM = tl.sum(tile_OM, axis=1).reshape(BLOCK_N, BLOCK_M)
        return tile_OM
