"""Kernels for many tokens: the weight written to memory, and the low-rank branch, to which a product W x is added.

Shapes: M tokens, I in_features, O out_features, R rank (padded), T columns of a tile, C of a strip.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.decode import decode_tile, dot, restore_columns
from lqer.kernels.integers.groups_decode import STRIP_C, plain_values
from lqer.kernels.low_rank import first_rank_of, load_factor
from lqer.kernels.rounding import round_columns


@triton.jit
def dequantize_kernel(
    words,  # these four as in layout/codes.py
    high,
    scales,
    zeros,
    w_out,  # [O, I]
    N,
    K,
    layout: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Decode one tile of BLOCK_N rows to memory."""
    rows_O = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    tile_k: tl.constexpr = layout.tile_k
    w_OT = decode_tile(
        words, high, scales, zeros, rows_O, tile,
        layout, w_out.dtype.element_ty,
    )  # fmt: skip
    columns_T = tile * tile_k + tl.arange(0, tile_k)
    inside = (rows_O < N)[:, None] & (columns_T < K)[None, :]
    tl.store(w_out + rows_O.to(tl.int64)[:, None] * K + columns_T[None, :], restore_columns(w_OT), mask=inside)


@triton.jit
def group_dequantize_kernel(
    words,  # these three as in layout/groups.py
    scales,
    zeros,
    w_out,  # [O, I]
    N,
    K,
    layout: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Decode BLOCK_N rows of a strip to memory, rounded once."""
    rows_O = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    strip = tl.program_id(1)
    values_OC = plain_values(words, scales, zeros, rows_O, strip, layout)
    columns_C = strip * STRIP_C + tl.arange(0, STRIP_C)
    inside = (rows_O < N)[:, None] & (columns_C < K)[None, :]
    place = w_out + rows_O.to(tl.int64)[:, None] * K + columns_C[None, :]
    tl.store(place, values_OC.to(w_out.dtype.element_ty), mask=inside)


# M changes from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def low_rank_kernel(
    y,  # [M, O]
    projection,  # Q(x A) [M, RP]
    b_codes,  # [own rank, O] int8 or values
    b_exponents,  # [own rank / b_block, O] uint8, or None
    bias,  # [O], or None
    segments,  # int32 [O / 64], see joint.py, or None
    M,
    N,
    rank: tl.constexpr,  # of all segments
    own_rank: tl.constexpr,  # of one
    b_block: tl.constexpr,
    rounding: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    pdl: tl.constexpr,
):
    """y = Q(Q(x A) B) + b. A product then adds W x in its epilogue, without another pass over y."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    columns_O = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = (rows_M < M)[:, None]
    dtype: tl.constexpr = y.dtype.element_ty
    product_MO = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_rank = first_rank_of(segments, tl.program_id(0) * BLOCK_N, own_rank)
    for first in tl.static_range(0, own_rank, BLOCK_R):
        place = projection + rows_M.to(tl.int64)[:, None] * rank + first_rank + first + tl.arange(0, BLOCK_R)[None, :]
        xa_MR = tl.load(place, mask=row_inside, other=0.0)
        b_RO = load_factor(b_codes, b_exponents, first, columns_O, N, own_rank, BLOCK_R, b_block, dtype)
        product_MO = dot(xa_MR, b_RO, product_MO)
    if rounding.bits > 0:
        product_MO = round_columns(product_MO, rounding)
    if bias is not None:
        product_MO += tl.load(bias + columns_O, mask=columns_O < N, other=0.0).to(tl.float32)[None, :]
    place = y + rows_M.to(tl.int64)[:, None] * N + columns_O[None, :]
    tl.store(place, product_MO.to(dtype), mask=row_inside & (columns_O < N)[None, :])
