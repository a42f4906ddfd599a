"""Many tokens, where a library's products on decoded weights win: what has to be in memory for them.

Shapes: M tokens, N out_features, K in_features, T columns of a tile, R ranks and C columns of Aᵀ.
"""

import triton
import triton.language as tl

from .branch import load_factor, load_transposed
from .decode import decode_tile, dot, restore_columns
from .rounding import round_columns


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


# M changes from call to call: no new compilation for 1, or for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def branch_kernel(
    y,  # [M, N]
    projection,  # x A, float32 [M, RP]
    b_codes,
    b_exponents,
    bias,  # [N], or None
    M,
    N,
    rank: tl.constexpr,
    b_block: tl.constexpr,
    x_bits: tl.constexpr,
    x_block: tl.constexpr,
    x_ceil: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = Q(Q(x A) B) + b, to which a library adds the product with W without another pass over y."""
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = (rows_M < M)[:, None]
    dtype: tl.constexpr = y.dtype.element_ty
    product_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.static_range(0, rank, BLOCK_R):
        place = projection + rows_M.to(tl.int64)[:, None] * rank + first + tl.arange(0, BLOCK_R)[None, :]
        xa_MR = tl.load(place, mask=row_inside, other=0.0)
        if x_bits > 0:
            xa_MR = round_columns(xa_MR, x_block, x_bits, x_ceil)
        b_RN = load_factor(b_codes, b_exponents, first, rows_N, N, rank, BLOCK_R, b_block, dtype)
        product_MN = dot(xa_MR.to(dtype), b_RN, product_MN)
    if x_bits > 0:
        product_MN = round_columns(product_MN, x_block, x_bits, x_ceil)
    if bias is not None:
        product_MN += tl.load(bias + rows_N, mask=rows_N < N, other=0.0).to(tl.float32)[None, :]
    place = y + rows_M.to(tl.int64)[:, None] * N + rows_N[None, :]
    tl.store(place, product_MN.to(dtype), mask=row_inside & (rows_N < N)[None, :])
