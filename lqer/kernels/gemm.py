"""Few tokens: y = W_q x_q + b with weights decoded in registers.

The product is computed as yᵀ = W xᵀ, so that decoded weights are the operand that tensor cores take from registers.
For few tokens the grid would not fill the chip: K is then cut into `splits`, each with a slab of partial products. The
program that finishes a tile of outputs last adds its slabs up in a fixed order, so that runs agree bit for bit. With a
low-rank branch that is left to a kernel of its own (epilogue.py): here it would take registers from the loop.

Shapes: M tokens, N out_features, K in_features.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode import decode_tile, dot, permute_columns


# M changes from call to call: no new compilation for 1, or for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x,  # [M, K], rows `x_stride` apart
    words,
    high,
    scales,
    zeros,
    bias,  # [N], or None
    partial,  # [splits, N, M] float32, or None where one split writes y
    finished,  # int32, zero before and after, one a tile of outputs; or None
    y,  # [M, N], or None where slabs are left to the epilogue
    M,
    N,
    K,
    x_stride,
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
    BLOCK_M: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
    wait_first: tl.constexpr,  # x comes from a kernel that may still run
    wait_last: tl.constexpr,  # only the kernel after this one needs what comes from it
):
    pid_n, pid_s, pid_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows_N = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = x.dtype.element_ty
    tile_k: tl.constexpr = 16 * (32 // width)
    columns_T = tl.arange(0, tile_k)
    x_rows = x + rows_M.to(tl.int64)[:, None] * x_stride + columns_T[None, :]
    row_inside = (rows_M < M)[:, None]
    if wait_first:
        gdc_wait()
    if wait_first or wait_last:
        gdc_launch_dependents()
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in tl.range(pid_s, tiles, splits, num_stages=stages):
        w_NT = decode_tile(
            words, high, scales, zeros, rows_N, tile,
            tiles, units, tiles_per_unit, per_tile, halves, bits, width, offset, exponents, dtype, paired,
        )  # fmt: skip
        inside = row_inside & (tile * tile_k + columns_T < K)[None, :]
        x_MT = permute_columns(tl.load(x_rows + tile * tile_k, mask=inside, other=0.0))
        acc_NM = dot(w_NT, tl.trans(x_MT), acc_NM)

    inside_NM = (rows_N < N)[:, None] & (rows_M < M)[None, :]
    if partial is not None:
        slab = N.to(tl.int64) * M
        place = partial + rows_N.to(tl.int64)[:, None] * M + rows_M[None, :]
        tl.store(place + pid_s * slab, acc_NM, mask=inside_NM)
    if wait_last:
        gdc_wait()
    if y is not None:
        last = True
        if splits > 1:
            # Every thread's part of the slab has to be out before this program counts as finished.
            tl.debug_barrier()
            counter = finished + pid_m * tl.num_programs(0) + pid_n
            last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
            if last:
                tl.store(counter, 0)
                acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for split in tl.static_range(splits):
                    acc_NM += tl.load(place + split * slab, mask=inside_NM, other=0.0)
        if last:
            if bias is not None:
                acc_NM += tl.load(bias + rows_N, mask=rows_N < N, other=0.0).to(tl.float32)[:, None]
            out = y + rows_M.to(tl.int64)[None, :] * N + rows_N[:, None]
            tl.store(out, acc_NM.to(y.dtype.element_ty), mask=inside_NM)
