"""Device functions that read the low-rank branch: tiles of A and B, and the projection x A.

The projection reduces over all of K. Its kernel leaves partial sums, a slab for each chunk of K; whoever needs the
projection adds them up in a fixed order, so that runs agree bit for bit, and rounds the sum.

Shapes: M tokens, R rank, C columns of a factor, S slabs.
"""

import triton
import triton.language as tl

from .decode import exponent_to_scale
from .rounding import round_columns

SLABS_AT_ONCE = tl.constexpr(8)


@triton.jit
def load_factor(
    codes,
    exponents,
    first_row,
    columns_C,
    n_columns,
    n_rows,  # of the factor
    rows: tl.constexpr,
    block: tl.constexpr,
    dtype: tl.constexpr,
):
    """`rows` rows of a factor [., n_columns] in `dtype`: int8 codes with step exponents per `block` rows, or values.

    Rows from n_rows on and columns from n_columns on are zero.
    """
    rows_R = first_row + tl.arange(0, rows)
    inside = (rows_R < n_rows)[:, None] & (columns_C < n_columns)[None, :]
    values = tl.load(codes + rows_R.to(tl.int64)[:, None] * n_columns + columns_C[None, :], mask=inside, other=0)
    if exponents is None:
        return values.to(dtype)
    else:
        blocks: tl.constexpr = rows // block
        width: tl.constexpr = values.shape[1]
        rows_B = first_row // block + tl.arange(0, blocks)
        inside_B = (rows_B * block < n_rows)[:, None] & (columns_C < n_columns)[None, :]
        place = exponents + rows_B.to(tl.int64)[:, None] * n_columns + columns_C[None, :]
        scale = exponent_to_scale(tl.load(place, mask=inside_B, other=0), tl.float32).reshape(blocks, 1, width)
        scaled = values.to(tl.float32).reshape(blocks, block, width) * scale
        return scaled.reshape(rows, width).to(dtype)


@triton.jit
def load_projection(
    partial,  # [slabs, M, rank] float32
    first_row,
    M,
    first_rank,
    tokens: tl.constexpr,
    ranks: tl.constexpr,
    rank: tl.constexpr,
    slabs: tl.constexpr,
    x_bits: tl.constexpr,
    x_block: tl.constexpr,
    x_ceil: tl.constexpr,
    dtype: tl.constexpr,
):
    """Q(x A) in `dtype`, [tokens, ranks] from row first_row and rank first_rank on; zero beyond row M."""
    rows_M = first_row + tl.arange(0, tokens)
    ranks_R = first_rank + tl.arange(0, ranks)
    slab_size = tl.cast(M, tl.int64) * rank
    inside = (rows_M < M)[:, None]
    place = partial + rows_M.to(tl.int64)[:, None] * rank + ranks_R[None, :]
    if slabs == 1:
        xa_MR = tl.load(place, mask=inside, other=0.0)
    else:
        xa_MR = tl.zeros((tokens, ranks), tl.float32)
        for first in range(0, slabs, SLABS_AT_ONCE):
            slab = first + tl.arange(0, SLABS_AT_ONCE)
            parts = tl.load(
                place[None, :, :] + slab.to(tl.int64)[:, None, None] * slab_size,
                mask=inside[None, :, :] & (slab < slabs)[:, None, None],
                other=0.0,
            )
            xa_MR += tl.sum(parts, axis=0)
    if x_bits > 0:
        xa_MR = round_columns(xa_MR, x_block, x_bits, x_ceil)
    return xa_MR.to(dtype)
