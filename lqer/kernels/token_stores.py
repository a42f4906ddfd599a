"""How tokens are stored for a product with lattice or trellis codes: as integers of two bytes, or in float16.

Values come as tiles of 128 columns. A step is a power of two, of a tile or of a token.

Shapes: N tiles, C columns of a tile.
"""

import triton
import triton.language as tl

from lqer.kernels.lattice_decode import token_order
from lqer.kernels.rounding import ROUNDER

# 2^15 / (127 * 256 + 127): the largest value of a tile gets 15 bits without an h above 127.
LARGEST_ROOM = tl.constexpr(32768 / 32639)
LEAST_EXPONENT = tl.constexpr(32)  # keeps the step and its inverse normal
LEAST_EXPONENT_UP = tl.constexpr(2 * 127 + 14)


@triton.jit
def scale_up(largest):
    """The biased exponent of a value, and the power of two that brings it to 2^14 and above, below 2^15."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, LEAST_EXPONENT)
    return exponent, ((-exponent + LEAST_EXPONENT_UP) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _two_bytes(x_NC):
    """x as 256 h + l with h and l from -128 to 127, the integers 256 h + l, and the biased exponents of the largest."""
    # A little larger than the largest value, so that no h is 128; with its exponent the largest value has 15 bits.
    exponent_N, up_N = scale_up(tl.max(tl.abs(x_NC), axis=1) * LARGEST_ROOM)
    integers_NC = ((x_NC * up_N[:, None] + ROUNDER) - ROUNDER).to(tl.int32)
    low_NC = ((integers_NC + 128) & 255) - 128
    return (integers_NC - low_NC) >> 8, low_NC, integers_NC, exponent_N


@triton.jit
def store_tiles(x_NC, x_out, steps, columns_NC, tiles_N, tiles: tl.constexpr):
    """Write tiles of a token in float16, with their steps (trellis.py)."""
    exponent_N, up_N = scale_up(tl.max(tl.abs(x_NC), axis=1))
    tl.store(x_out + columns_NC, (x_NC * up_N[:, None]).to(tl.float16), mask=(tiles_N < tiles)[:, None])
    tl.store(steps + tiles_N, ((exponent_N - 14) << 23).to(tl.float32, bitcast=True), mask=tiles_N < tiles)


@triton.jit
def store_bytes(x_NC, x_out, steps, columns_NC, tiles_N, tiles: tl.constexpr):
    """Write tiles of a token as bytes h and l (byte_sums.py)."""
    high_NC, low_NC, _, exponent_N = _two_bytes(x_NC)
    inside_NC = (tiles_N < tiles)[:, None] & (columns_NC >= 0)
    padded: tl.constexpr = tiles * x_NC.shape[1]
    tl.store(x_out + columns_NC, high_NC.to(tl.int8), mask=inside_NC)
    tl.store(x_out + padded + columns_NC, low_NC.to(tl.int8), mask=inside_NC)
    # 2^(exponent - 127 - 14), times the 1 / 128 of values; not finite where x is not.
    step_N = ((exponent_N - 21) << 23).to(tl.float32, bitcast=True) + tl.sum(x_NC - x_NC, axis=1)
    tl.store(steps + tiles_N, step_N, mask=tiles_N < tiles)


@triton.jit
def store_integers(x_NC, x_out, steps, columns_NC, tiles_N, tiles: tl.constexpr):
    """Write tiles of a token as integers 256 h + l with h and l from -128 to 127 (lattice.py)."""
    high_NC, low_NC, integers_NC, exponent_N = _two_bytes(x_NC)
    inside_NC = (tiles_N < tiles)[:, None] & (columns_NC >= 0)
    padded: tl.constexpr = tiles * x_NC.shape[1]
    place_NC = x_out + token_order(columns_NC)
    tl.store(place_NC, high_NC.to(tl.int8), mask=inside_NC)
    tl.store(place_NC + padded, low_NC.to(tl.int8), mask=inside_NC)
    # 2^(exponent - 127 - 14), times the 1 / 32 of sums.
    tl.store(steps + 2 * tiles_N, (exponent_N - 19) << 23, mask=tiles_N < tiles)
    tl.store(steps + 2 * tiles_N + 1, -120 * tl.sum(integers_NC, axis=1), mask=tiles_N < tiles)
