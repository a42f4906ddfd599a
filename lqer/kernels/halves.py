"""Tokens in float16, in the order in which lanes read them for a product with trellis or lattice codes.

    x        float16 [MP/8, tiles, 4, 32, 8]    [.., j, 4 g + t, :]: what lane 4 g + t reads of token g of a block
    steps    float32 [M]                        a power of two for each token; x times it is the token

The eight columns [j, t, :] of a tile are those of the weights that a lane decodes one after the other,

    trellis     columns 64 (j / 2) + 16 t + 8 (j % 2) .. + 7, of rows 2 g and 2 g + 1
    lattice     columns 32 t + 8 j .. + 7, in the order 0, 4, 1, 5, 2, 6, 3, 7, of rows g and g + 8

so a load gives the operand of two products, of adjacent bytes for all lanes (trellis/resident_ptx.py,
lattice/halves.py). In Triton's interpreter the same is computed in plain operations.

Shapes: M tokens, O rows of W, C columns of a tile, U units of a row in it.
"""

import triton
import triton.language as tl

from lqer.kernels.lattice.decode import nibble_values, unit_places, unit_word
from lqer.kernels.layout.lattice import LatticeLayout
from lqer.kernels.layout.tiles import TILE_K
from lqer.kernels.trellis.decode import TILE_C, plain_values

# Products of a tensor core have eight tokens; a tile has four loads of eight columns for each lane.
TOKENS_AT_ONCE, LOADS = 8, 4
TOKENS_AT_ONCE_C = tl.constexpr(TOKENS_AT_ONCE)
BLOCK_HALVES = TOKENS_AT_ONCE * TILE_K  # of a tile
BLOCK_HALVES_C = tl.constexpr(BLOCK_HALVES)
LOAD_BYTES = 2 * BLOCK_HALVES // LOADS
MULTIPLY_HALVES = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


@triton.constexpr_function
def is_lattice(layout: object) -> bool:
    return isinstance(layout, LatticeLayout)


@triton.jit
def place_of_halves(token, columns, tiles: tl.constexpr, lattice: tl.constexpr):
    """Where columns of tokens lie among the values of x."""
    tile, inside = columns // TILE_C, columns % TILE_C
    if lattice:
        lane, load, own = inside // 32, inside // 8 % 4, inside % 4 * 2 + inside // 4 % 2
    else:
        lane, load, own = inside // 16 % 4, inside // 64 * 2 + inside // 8 % 2, inside % 8
    return ((token // 8 * tiles + tile) * 4 + load) * 256 + token % 8 * 32 + lane * 8 + own


@triton.jit
def plain_product(words, table, x, rows_O, rows_M, tile, M, layout: tl.constexpr):
    """The product [O, M] of row groups with tokens, in plain operations."""
    columns_C = tile * TILE_C + tl.arange(0, TILE_C)
    if is_lattice(layout):
        values_OC = plain_points(words, table, rows_O, tile, layout.tiles) * 4
    else:
        values_OC = plain_values(words, None, rows_O, columns_C, layout)
    tokens_M = tl.minimum(rows_M, M - 1)
    place_CM = place_of_halves(tokens_M[None, :], columns_C[:, None], layout.tiles, is_lattice(layout))
    return tl.dot(values_OC, tl.load(x + place_CM).to(tl.float32))


@triton.jit
def plain_points(units, table, rows_O, tile, tiles: tl.constexpr):
    """The lattice points of a tile [O, C], in plain operations."""
    units_OU = tl.load(unit_places(units, rows_O, tile, tiles))
    k = tl.arange(0, 8)[None, None, :]
    first = tl.join(_point(units_OU, table, 0, k), _point(units_OU, table, 2, k))
    second = tl.join(_point(units_OU, table, 1, k), _point(units_OU, table, 3, k))
    # [O, unit, coordinate, both bits of the code] to [O, unit, code, coordinate]
    both = tl.join(first, second).reshape(units_OU.shape[0], units_OU.shape[1], 8, 4)
    return both.permute(0, 1, 3, 2).reshape(units_OU.shape[0], TILE_C)


@triton.jit
def _point(units_OU, table, c: tl.constexpr, k):
    return nibble_values(unit_word(units_OU, table, c)[:, :, None], k, tl.float32)
