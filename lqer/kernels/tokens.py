"""Rounds activations, in their own order or in that of the weights' tiles.

Shapes: M tokens, K in_features, T columns of a program.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode import permute_columns
from .rounding import round_columns


# M changes from call to call: no new compilation for 1, or for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def round_kernel(
    x,  # [M, K], rows `x_stride` apart
    x_out,  # rounded, [M, K] or, in kernel order, [M, KP]
    M,
    K,
    x_stride,
    padded: tl.constexpr,  # KP
    tile_k: tl.constexpr,  # of the kernel order that x_out is in; 0: natural order
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    x_bits: tl.constexpr,
    x_block: tl.constexpr,
    x_ceil: tl.constexpr,
    chained: tl.constexpr,
):
    if chained:
        gdc_wait()
        gdc_launch_dependents()
    rows_M = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    columns_T = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (rows_M < M) & (columns_T < K)
    x_MT = tl.load(x + rows_M * x_stride + columns_T, mask=inside, other=0.0).to(tl.float32)
    x_MT = round_columns(x_MT, x_block, x_bits, x_ceil).to(x.dtype.element_ty)
    if tile_k > 0:
        place = x_out + rows_M * padded + columns_T
        tl.store(place, permute_columns(x_MT, tile_k), mask=(rows_M < M) & (columns_T < padded))
    else:
        tl.store(x_out + rows_M * K + columns_T, x_MT, mask=inside)
