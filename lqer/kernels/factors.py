"""Device functions of the low-rank branch: tiles of A and B, sums over slabs of partial products, Q(Q(x A) B).

Shapes: M tokens, N out_features, R rank (padded to whole blocks), C columns of a factor.
"""

import triton
import triton.language as tl

from .decode import exponent_to_scale

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
def sum_slabs(partial, offset_MR, inside, slab, slabs: tl.constexpr):
    """The sum over slabs, `slab` elements apart, of float32 [M, R]."""
    sum_MR = tl.zeros(offset_MR.shape, tl.float32)
    for first in tl.static_range(0, slabs, SLABS_AT_ONCE):
        number = first + tl.arange(0, SLABS_AT_ONCE)
        parts = tl.load(
            partial + number.to(tl.int64)[:, None, None] * slab + offset_MR[None, :, :],
            mask=inside[None, :, :] & (number < slabs)[:, None, None],
            other=0.0,
        )
        sum_MR += tl.sum(parts, axis=0)
    return sum_MR
