"""Device function that writes tokens in their own order or in that of decoded columns.

Shapes: M tokens, I in_features, T columns of a program; P marks padding.
"""

import triton
import triton.language as tl

from lqer.kernels.decode import permute_columns
from lqer.kernels.integers.groups_wide import order_steps


@triton.jit
def store_tokens(
    x_MT,
    x_out,  # [M, I], or [M, IP] in the order of decoded columns
    rows_M1,  # int64
    columns_1T,
    M,
    K,
    padded: tl.constexpr,  # IP
    tile_k: tl.constexpr,  # columns of a tile, for the order of integer codes
    steps: tl.constexpr,  # the order of integer groups; neither: natural order
):
    """Write columns of some tokens."""
    if tile_k > 0 or steps:
        x_MT = order_steps(x_MT) if steps else permute_columns(x_MT, tile_k)
        tl.store(x_out + rows_M1 * padded + columns_1T, x_MT, mask=(rows_M1 < M) & (columns_1T < padded))
    else:
        tl.store(x_out + rows_M1 * K + columns_1T, x_MT, mask=(rows_M1 < M) & (columns_1T < K))
