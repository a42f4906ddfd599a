"""Many tokens, where a library's products on decoded weights win: decode a weight, or a factor, to memory.

Shapes: N out_features, K in_features, T columns of a tile, R rows and C columns of a factor.
"""

import triton
import triton.language as tl

from .branch import load_factor
from .decode import decode_tile, restore_columns


@triton.jit
def expand_kernel(
    words,
    high,
    scales,
    zeros,
    w_out,  # [N, K]
    N,
    K,
    tiles: tl.constexpr,
    units: tl.constexpr,
    tiles_per_unit: tl.constexpr,
    per_tile: tl.constexpr,
    halves: tl.constexpr,
    bits: tl.constexpr,
    width: tl.constexpr,
    offset: tl.constexpr,
    exponents: tl.constexpr,
    paired: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Decode one tile of BLOCK_N rows."""
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    tile_k: tl.constexpr = 16 * (32 // width)
    w_NT = decode_tile(
        words, high, scales, zeros, rows_N, tile,
        tiles, units, tiles_per_unit, per_tile, halves, bits, width, offset, exponents, w_out.dtype.element_ty, paired,
    )  # fmt: skip
    columns_T = tile * tile_k + tl.arange(0, tile_k)
    inside = (rows_N < N)[:, None] & (columns_T < K)[None, :]
    tl.store(w_out + rows_N.to(tl.int64)[:, None] * K + columns_T[None, :], restore_columns(w_NT), mask=inside)


@triton.jit
def expand_factor_kernel(
    codes,  # int8 [rows, columns] and exponents [rows / block, columns], see factors.py
    exponents,
    out,  # [rows, columns]
    n_rows,
    n_columns,
    block: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Decode BLOCK_R rows of a factor."""
    first = tl.program_id(0) * BLOCK_R
    columns_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows_R = first + tl.arange(0, BLOCK_R)
    values = load_factor(codes, exponents, first, columns_C, n_columns, n_rows, BLOCK_R, block, out.dtype.element_ty)
    place = out + rows_R.to(tl.int64)[:, None] * n_columns + columns_C[None, :]
    tl.store(place, values, mask=(rows_R < n_rows)[:, None] & (columns_C < n_columns)[None, :])
