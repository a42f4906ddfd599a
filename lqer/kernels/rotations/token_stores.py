"""How tokens are stored for a product with lattice or trellis codes: as integers of two bytes, or in float16.

Values come as tiles of 128 columns. A step is a power of two, of a tile or of a token. Where a warp has a tile, lane l
has its columns 4 l to 4 l + 3, as four tensors, an element a thread; these are stored without a change of layout,
which would take a barrier of all warps each.

Shapes: N tiles, C columns of a tile, T threads.
"""

import triton
import triton.language as tl

from lqer.kernels.halves import place_of_halves
from lqer.kernels.lattice.decode import TILE_C, token_order
from lqer.kernels.rounding import ROUNDER

# 2^15 / (127 * 256 + 127): the largest value of a tile gets 15 bits without an h above 127.
LARGEST_ROOM = tl.constexpr(32768 / 32639)
LEAST_EXPONENT = tl.constexpr(32)  # keeps the step and its inverse normal
LEAST_EXPONENT_UP = tl.constexpr(2 * 127 + 14)
BYTES_EXPONENT = tl.constexpr(14 + 7)
# 2^(exponent - 127 - 14), times the 1 / 32 of sums of lattice codes.
INTEGERS_EXPONENT = tl.constexpr(14 + 5)


@triton.jit
def scale_up(largest):
    """The biased exponent of a value, and the power of two that brings it to 2^14 and above, below 2^15."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, LEAST_EXPONENT)
    return exponent, ((-exponent + LEAST_EXPONENT_UP) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves_of(scaled):
    """Values as integers 256 h + l with h and l from -128 to 127; these, and the integers."""
    integers = ((scaled + ROUNDER) - ROUNDER).to(tl.int32)
    low = ((integers + 128) & 255) - 128
    return (integers - low) >> 8, low, integers


@triton.jit
def _two_bytes(x_NC):
    """x as `_halves_of` its tile's multiple, and the biased exponents of the largest."""
    # A little larger than the largest value, so that no h is 128; with its exponent the largest value has 15 bits.
    exponent_N, up_N = scale_up(tl.max(tl.abs(x_NC), axis=1) * LARGEST_ROOM)
    high_NC, low_NC, integers_NC = _halves_of(x_NC * up_N[:, None])
    return high_NC, low_NC, integers_NC, exponent_N


@triton.jit
def store_tiles(x_NC, x_out, steps, columns_NC, tiles_N, tiles: tl.constexpr):
    """Write tiles of a token in float16, with their steps (layout/trellis.py)."""
    exponent_N, up_N = scale_up(tl.max(tl.abs(x_NC), axis=1))
    tl.store(x_out + columns_NC, (x_NC * up_N[:, None]).to(tl.float16), mask=(tiles_N < tiles)[:, None])
    tl.store(steps + tiles_N, ((exponent_N - 14) << 23).to(tl.float32, bitcast=True), mask=tiles_N < tiles)


@triton.jit
def store_halves(
    x_T, largest_T, reach: tl.constexpr, x_out, steps, token, columns_T, tiles: tl.constexpr, lattice: tl.constexpr
):
    """Write some columns of a token in float16, and its step once (halves.py).

    largest_T: of the token before its rotation, so that nothing exceeds `reach` times as much.
    """
    exponent_T, up_T = scale_up(largest_T * reach)
    place_T = place_of_halves(token.to(tl.int64), columns_T, tiles, lattice)
    tl.store(x_out + place_T, (x_T * up_T).to(tl.float16), mask=columns_T < tiles * TILE_C)
    # All programs of a token have the same, and the first one stores it once: thousands of stores to a sector take
    # longer than all else. Not finite where the token is not.
    step_T = ((exponent_T - 14) << 23).to(tl.float32, bitcast=True) + (largest_T - largest_T)
    tl.store(steps + token + columns_T * 0, step_T, mask=columns_T == 0)


@triton.jit
def store_halves_of_lanes(
    values, reach: tl.constexpr, x_out, steps, token, thread_T, program, tiles: tl.constexpr, lattice: tl.constexpr
):
    """The same for a tile a warp. values: four of each lane, and the largest magnitude of their token."""
    largest_T = values[4]
    columns_T = (program * thread_T.shape[0] + thread_T) * 4
    inside_T = columns_T < tiles * TILE_C
    exponent_T, up_T = scale_up(largest_T * reach)
    if lattice:
        for i in tl.static_range(4):
            place_T = place_of_halves(token.to(tl.int64), columns_T + i, tiles, True)
            tl.store(x_out + place_T, (values[i] * up_T).to(tl.float16), mask=inside_T)
    else:
        scaled = (values[0] * up_T, values[1] * up_T, values[2] * up_T, values[3] * up_T)
        store_four(x_out + place_of_halves(token.to(tl.int64), columns_T, tiles, False), scaled, inside_T)
    step_T = ((exponent_T - 14) << 23).to(tl.float32, bitcast=True) + (largest_T - largest_T)
    tl.store(steps + token + columns_T * 0, step_T, mask=columns_T == 0)


@triton.jit
def store_bytes(x_NC, x_out, steps, columns_NC, tiles_N, tiles: tl.constexpr):
    """Write tiles of a token as bytes h and l (trellis/byte_sums.py)."""
    high_NC, low_NC, _, exponent_N = _two_bytes(x_NC)
    inside_NC = (tiles_N < tiles)[:, None] & (columns_NC >= 0)
    padded: tl.constexpr = tiles * x_NC.shape[1]
    tl.store(x_out + columns_NC, high_NC.to(tl.int8), mask=inside_NC)
    tl.store(x_out + padded + columns_NC, low_NC.to(tl.int8), mask=inside_NC)
    # 2^(exponent - 127 - 14), times the 1 / 128 of values; not finite where x is not.
    step_N = ((exponent_N - BYTES_EXPONENT) << 23).to(tl.float32, bitcast=True) + tl.sum(x_NC - x_NC, axis=1)
    tl.store(steps + tiles_N, step_N, mask=tiles_N < tiles)


@triton.jit
def store_bytes_of_lanes(values, x_out, steps, thread_T, program, tiles: tl.constexpr):
    """The same for a tile a warp. values: four of each lane, and the largest magnitude of their tile."""
    largest_T = values[4]
    lane_T, tile_T = thread_T % 32, program * (thread_T.shape[0] // 32) + thread_T // 32
    exponent_T, up_T = scale_up(largest_T * LARGEST_ROOM)
    highs_T, lows_T = tl.zeros_like(lane_T), tl.zeros_like(lane_T)
    for i in tl.static_range(4):
        high_T, low_T, _ = _halves_of(values[i] * up_T)
        highs_T |= (high_T & 255) << 8 * i
        lows_T |= (low_T & 255) << 8 * i
    inside_T = tile_T < tiles
    place_T = x_out.to(tl.pointer_type(tl.int32)) + tile_T * 32 + lane_T
    tl.store(place_T, highs_T, mask=inside_T)
    tl.store(place_T + tiles * 32, lows_T, mask=inside_T)
    step_T = ((exponent_T - BYTES_EXPONENT) << 23).to(tl.float32, bitcast=True) + (largest_T - largest_T)
    tl.store(steps + tile_T, step_T, mask=inside_T & (lane_T == 0))


@triton.jit
def load_four(place_T, inside_T):
    """Four adjacent values of each lane, float32."""
    return (
        tl.load(place_T, mask=inside_T, other=0.0).to(tl.float32),
        tl.load(place_T + 1, mask=inside_T, other=0.0).to(tl.float32),
        tl.load(place_T + 2, mask=inside_T, other=0.0).to(tl.float32),
        tl.load(place_T + 3, mask=inside_T, other=0.0).to(tl.float32),
    )


@triton.jit
def store_four(place_T, values, inside_T):
    """Round four values of each lane, and store them next to each other: at once, if they have 16 bits."""
    dtype: tl.constexpr = place_T.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        bits_T = tl.zeros_like(values[0]).to(tl.int64)
        for i in tl.static_range(4):
            bits_T |= (values[i].to(dtype).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << 16 * i
        tl.store(place_T.to(tl.pointer_type(tl.int64)), bits_T, mask=inside_T)
    else:
        for i in tl.static_range(4):
            tl.store(place_T + i, values[i].to(dtype), mask=inside_T)


@triton.jit
def store_integers(x_NC, x_out, steps, columns_NC, tiles_N, tiles: tl.constexpr):
    """Write tiles of a token as integers 256 h + l with h and l from -128 to 127 (layout/lattice.py)."""
    high_NC, low_NC, integers_NC, exponent_N = _two_bytes(x_NC)
    inside_NC = (tiles_N < tiles)[:, None] & (columns_NC >= 0)
    padded: tl.constexpr = tiles * x_NC.shape[1]
    place_NC = x_out + token_order(columns_NC)
    tl.store(place_NC, high_NC.to(tl.int8), mask=inside_NC)
    tl.store(place_NC + padded, low_NC.to(tl.int8), mask=inside_NC)
    tl.store(steps + 2 * tiles_N, (exponent_N - INTEGERS_EXPONENT) << 23, mask=tiles_N < tiles)
    tl.store(steps + 2 * tiles_N + 1, -120 * tl.sum(integers_NC, axis=1), mask=tiles_N < tiles)


@triton.jit
def store_integers_of_lanes(values, x_out, steps, thread_T, program, tiles: tl.constexpr):
    """The same for a tile a warp. values: four of each lane, and the largest magnitude of their tile."""
    largest_T = values[4]
    lane_T, tile_T = thread_T % 32, program * (thread_T.shape[0] // 32) + thread_T // 32
    exponent_T, up_T = scale_up(largest_T * LARGEST_ROOM)
    inside_T = tile_T < tiles
    place_T = x_out.to(tl.pointer_type(tl.int16)) + (tile_T * TILE_C + token_order(lane_T * 4)) // 2
    first_high, first_low, first = _halves_of(values[0] * up_T)
    second_high, second_low, second = _halves_of(values[1] * up_T)
    third_high, third_low, third = _halves_of(values[2] * up_T)
    fourth_high, fourth_low, fourth = _halves_of(values[3] * up_T)
    # Columns 4 l and 4 l + 2 are adjacent, and so are the two others, 8 further on (layout/lattice.py).
    low_place_T = place_T + tiles * (TILE_C // 2)
    tl.store(place_T, _bytes_of(first_high, third_high), mask=inside_T)
    tl.store(place_T + 4, _bytes_of(second_high, fourth_high), mask=inside_T)
    tl.store(low_place_T, _bytes_of(first_low, third_low), mask=inside_T)
    tl.store(low_place_T + 4, _bytes_of(second_low, fourth_low), mask=inside_T)
    sum_T = sum_of_warp(first + second + third + fourth)
    of_tile_T = inside_T & (lane_T == 0)
    tl.store(steps + 2 * tile_T, (exponent_T - INTEGERS_EXPONENT) << 23, mask=of_tile_T)
    tl.store(steps + 2 * tile_T + 1, -120 * sum_T, mask=of_tile_T)


@triton.jit
def _bytes_of(low, high):
    return ((low & 255) | (high << 8)).to(tl.int16)


@triton.jit
def sum_of_warp(values_T):
    """The sum over its warp for each thread."""
    warps: tl.constexpr = values_T.shape[0] // 32
    sum_N = tl.sum(values_T.reshape(warps, 32), axis=1)
    return sum_N[:, None].broadcast_to(warps, 32).reshape(warps * 32)
