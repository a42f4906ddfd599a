"""Kernels on lattice codes: the product for few tokens, and decoding to memory for many.

The product y = W x + b + L (R x) is computed as yᵀ = W xᵀ, weights decoded in registers on their way into tensor cores.
A program reads all of its codes at once, before it waits for the kernel that makes x, so that memory is at work while
that one is. K is cut into spans of tiles, a program each; parts are slabs in memory, and the program that finishes a
tile of outputs last adds them up in a fixed order. Every part brings some of the ranks.

Shapes: M tokens, N out_features, K in_features, R rank (padded).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode import dot
from .lattice_decode import (
    TILE_C,
    UNITS_C,
    decode_units,
    load_tokens,
    load_units,
    nibble_values,
    pinned,
    share_table,
    unit_places,
    unit_word,
)
from .parts import add_parts

PROJECTION_ELEMENTS = tl.constexpr(4096)


@triton.jit(do_not_specialize=["M"])
def lattice_product_kernel(
    x,  # [M, KP] in token order
    units,
    table,
    scales,
    b_values,  # [RP, N] in the dtype of x, or None
    projection,  # parts of x A, float32 [slabs, M, RP], or None
    bias,  # [N], or None
    partial,  # float32 [splits, N, M], or None for one split
    finished,  # int32, zero before and after, one a tile of outputs
    y,  # [M, N]
    M,
    N,
    rank: tl.constexpr,
    slabs: tl.constexpr,
    BLOCK_S: tl.constexpr,  # slabs, as a power of two
    tiles: tl.constexpr,
    span: tl.constexpr,
    splits: tl.constexpr,
    tiles_n: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,  # of a tile that may be there, as a power of two
    BLOCK_R: tl.constexpr,
    chained: tl.constexpr,
):
    """A tile of outputs for BLOCK_M tokens."""
    pid = tl.program_id(0)
    pid_n, pid_s, pid_m = pid % tiles_n, pid // tiles_n % splits, pid // (tiles_n * splits)
    rows_N = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = x.dtype.element_ty
    loaded = load_units(units, rows_N, pid_s * span, tiles, span)
    rows_of_a = share_table(table)
    first_rank = pid_s * BLOCK_R
    ranks_R = tl.arange(0, BLOCK_R)
    if rank > 0 and first_rank < rank:
        place = b_values + (first_rank + ranks_R)[None, :] * N + rows_N[:, None]
        b_NR = tl.load(place, mask=(rows_N < N)[:, None], other=0.0)
    else:
        b_NR = tl.zeros((BLOCK_N, BLOCK_R), dtype)
    if chained:
        gdc_wait()
        gdc_launch_dependents()
    rows_M = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Tokens that are not there read another's.
    x_rows_M = x + tl.minimum(rows_M, M - 1).to(tl.int64) * (tiles * TILE_C) + pid_s * (span * TILE_C)
    address_M = pinned(x_rows_M)
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in tl.static_range(span):
        w_NT = decode_units(loaded[i], rows_of_a, dtype)
        acc_NM = dot(w_NT, tl.trans(load_tokens(address_M, i, dtype)), acc_NM)
    acc_NM *= tl.load(scales + rows_N)[:, None]
    if rank > 0:
        for turn in tl.static_range(0, rank, splits * BLOCK_R):
            first = first_rank + turn
            if first < rank:
                if turn > 0:
                    place = b_values + (first + ranks_R)[None, :] * N + rows_N[:, None]
                    b_NR = tl.load(place, mask=(rows_N < N)[:, None], other=0.0)
                xa_MR = _projection(
                    projection, first + ranks_R, pid_m * BLOCK_M, M, rank, slabs, BLOCK_S, BLOCK_M, TOKENS
                )
                acc_NM = dot(b_NR, tl.trans(xa_MR.to(dtype)), acc_NM)

    add_parts(acc_NM, partial, finished + pid_m * tiles_n + pid_n, pid_s, bias, y, rows_N, rows_M, M, N, splits, splits)


@triton.jit
def _projection(
    projection,
    ranks_R,
    first_token,
    M,
    rank: tl.constexpr,
    slabs: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """x A of a tile of tokens, float32 [BLOCK_M, R]: its parts added up."""
    width: tl.constexpr = ranks_R.shape[0]
    at_once: tl.constexpr = min(BLOCK_S, max(1, PROJECTION_ELEMENTS // (TOKENS * width)))
    tokens_M = tl.minimum(first_token + tl.arange(0, TOKENS), M - 1)
    xa_MR = tl.zeros((TOKENS, width), tl.float32)
    for first in range(0, slabs, at_once):
        slabs_S = first + tl.arange(0, at_once)
        place = projection + (slabs_S[:, None, None] * M + tokens_M[None, :, None]) * rank + ranks_R[None, None, :]
        xa_MR += tl.sum(tl.load(place, mask=(slabs_S < slabs)[:, None, None], other=0.0), axis=0)
    if TOKENS < BLOCK_M:
        tokens: tl.constexpr = BLOCK_M // TOKENS
        xa_MR = xa_MR[None, :, :].broadcast_to(tokens, TOKENS, width).reshape(BLOCK_M, width)
    return xa_MR


@triton.jit
def lattice_expand_kernel(
    units,
    table,
    scales,
    w_out,  # [N, K]
    N,
    K,
    tiles: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Decode a tile of BLOCK_N rows to memory, scaled in float32, columns in natural order."""
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    units_NU = tl.load(unit_places(units, rows_N, tile, tiles))
    scales_N = tl.load(scales + rows_N)
    k = tl.arange(0, 8)
    for c in tl.static_range(4):
        points = nibble_values(unit_word(units_NU, table, c)[:, :, None], k[None, None, :], tl.float32)
        values = (points * scales_N[:, None, None]).to(w_out.dtype.element_ty)
        columns = tile * TILE_C + ((4 * tl.arange(0, UNITS_C) + c) * 8)[None, :, None] + k[None, None, :]
        place = w_out + rows_N.to(tl.int64)[:, None, None] * K + columns
        tl.store(place, values, mask=(rows_N < N)[:, None, None] & (columns < K))
