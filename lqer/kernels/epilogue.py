"""Many tokens: the low-rank branch added to what a library's product left.

Shapes: M tokens, N out_features, R rank (padded to whole blocks).
"""

import triton
import triton.language as tl

from .branch import load_factor
from .decode import dot
from .rounding import round_columns


# M changes from call to call: no new compilation for 1, or for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def epilogue_kernel(
    y,  # [M, N], changed in place
    projection,  # x A, float32 [M, RP]
    b_codes,
    b_exponents,
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
    """Y += Q(Q(x A) B)."""
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = (rows_M < M)[:, None]
    dtype: tl.constexpr = y.dtype.element_ty
    out = y + rows_M.to(tl.int64)[:, None] * N + rows_N[None, :]
    inside = row_inside & (rows_N < N)[None, :]
    y_MN = tl.load(out, mask=inside, other=0.0).to(tl.float32)
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
    tl.store(out, (y_MN + product_MN).to(dtype), mask=inside)
