"""The last kernel of a layer with a low-rank branch: what the product left, plus the bias, plus Q(Q(x A) B).

Shapes: M tokens, N out_features, R rank (padded to whole blocks).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .decode import dot
from .factors import load_factor, load_projection
from .rounding import round_rows


@triton.jit
def low_rank_product(
    partial,
    b_codes,
    b_exponents,
    rows_N,
    first_row,
    N,
    M,
    tokens: tl.constexpr,
    rank: tl.constexpr,
    slabs: tl.constexpr,
    BLOCK_R: tl.constexpr,
    b_block: tl.constexpr,
    x_bits: tl.constexpr,
    x_block: tl.constexpr,
    x_ceil: tl.constexpr,
    dtype: tl.constexpr,
):
    """(Q(Q(x A) B))ᵀ float32 [N, tokens] for the tokens from first_row on."""
    product_NM = tl.zeros((rows_N.shape[0], tokens), tl.float32)
    for first in tl.static_range(0, rank, BLOCK_R):
        b_RN = load_factor(b_codes, b_exponents, first, rows_N, N, rank, BLOCK_R, b_block, dtype)
        xa_MR = load_projection(
            partial, first_row, M, first, tokens, BLOCK_R, rank, slabs, x_bits, x_block, x_ceil, dtype
        )
        product_NM = dot(tl.trans(b_RN), tl.trans(xa_MR), product_NM)
    if x_bits > 0:
        product_NM = round_rows(product_NM, x_block, x_bits, x_ceil)
    return product_NM


# M changes from call to call: no new compilation for 1, or for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def epilogue_kernel(
    partial,  # [splits, N, M] float32, or None where y holds the product
    bias,  # [N], or None
    projection,  # [slabs, M, RP] float32
    b_codes,
    b_exponents,
    y,  # [M, N]
    M,
    N,
    splits: tl.constexpr,
    rank: tl.constexpr,
    slabs: tl.constexpr,
    b_block: tl.constexpr,
    x_bits: tl.constexpr,
    x_block: tl.constexpr,
    x_ceil: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    chained: tl.constexpr,
):
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_NM = (rows_N < N)[:, None] & (rows_M < M)[None, :]
    dtype: tl.constexpr = y.dtype.element_ty
    if chained:
        gdc_wait()
    y_NM = low_rank_product(
        projection, b_codes, b_exponents, rows_N, tl.program_id(1) * BLOCK_M, N, M,
        BLOCK_M, rank, slabs, BLOCK_R, b_block, x_bits, x_block, x_ceil, dtype,
    )  # fmt: skip
    if bias is not None:
        y_NM += tl.load(bias + rows_N, mask=rows_N < N, other=0.0).to(tl.float32)[:, None]
    out = y + rows_M.to(tl.int64)[None, :] * N + rows_N[:, None]
    if partial is None:
        y_NM += tl.load(out, mask=inside_NM, other=0.0).to(tl.float32)
    else:
        slab = N.to(tl.int64) * M
        place = partial + rows_N.to(tl.int64)[:, None] * M + rows_M[None, :]
        for split in tl.static_range(splits):
            y_NM += tl.load(place + split * slab, mask=inside_NM, other=0.0)
    tl.store(out, y_NM.to(dtype), mask=inside_NM)
