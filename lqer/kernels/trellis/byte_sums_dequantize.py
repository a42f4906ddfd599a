"""The kernel that writes the values of trellis codes of table "bytes" to memory.

Shapes: I in_features, O out_features, T threads of a program, C columns of a thread.
"""

import triton
import triton.language as tl

from lqer.kernels.decode import ROWS_C
from lqer.kernels.trellis.byte_sums import byte_sums, joined, load_groups
from lqer.kernels.trellis.decode import TILE_C


@triton.jit
def byte_sums_dequantize_kernel(
    words,  # as in layout/trellis.py
    scales,  # float32 [OP]
    w_out,  # [O, I]
    N,
    K,
    layout: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Decode a tile of 16 * WARPS rows to memory, scaled in float32. A thread has 16 columns of two rows, twice."""
    thread_T, tile = tl.arange(0, WARPS * 32), tl.program_id(1)
    lane_T, last = thread_T % 32, (N - 1) // ROWS_C
    group_T = tl.program_id(0) * WARPS + thread_T // 32
    codes = load_groups(words, group_T, lane_T, tile, last, layout, 1)
    sums = byte_sums(codes, layout)
    for i in tl.static_range(4):
        half, h = i // 2, i % 2
        row_T = group_T * ROWS_C + lane_T // 4 * 2 + h
        column_T = tile * TILE_C + (half * 4 + lane_T % 4) * 16
        scales_T = tl.load(scales + row_T, mask=row_T < N, other=0.0)
        values_TC = joined(sums[16 * i : 16 * i + 16], 16).to(tl.float32) / 128 * scales_T[:, None]
        place_TC = (row_T.to(tl.int64) * K + column_T)[:, None] + tl.arange(0, 16)[None, :]
        # Columns are multiples of 16.
        inside_TC = ((row_T < N) & (column_T < K))[:, None] & (tl.arange(0, 16) >= 0)[None, :]
        tl.store(w_out + place_TC, values_TC.to(w_out.dtype.element_ty), mask=inside_TC)
