"""Many tokens, where a library's products on decoded weights win: decode a weight, or a factor, to memory.

Shapes: N out_features, K in_features, T columns of a tile, R ranks and C columns of Aᵀ.
"""

import triton
import triton.language as tl

from .branch import load_transposed
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
    codes,  # Aᵀ: int8 [ranks, columns] and exponents [ranks, columns / block], see branch.py
    exponents,
    out,  # [ranks, columns]
    n_ranks,
    n_columns,
    block: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Decode BLOCK_C columns of BLOCK_R ranks."""
    ranks_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * BLOCK_C
    dtype: tl.constexpr = out.dtype.element_ty
    values = load_transposed(codes, exponents, ranks_R, first, n_ranks, n_columns, BLOCK_C, block, dtype)
    columns_C = first + tl.arange(0, BLOCK_C)
    place = out + ranks_R[:, None] * n_columns + columns_C[None, :]
    tl.store(place, values, mask=(ranks_R < n_ranks)[:, None] & (columns_C < n_columns)[None, :])
