"""The first kernel of a layer: rounds the activations and projects them onto A, reading x once.

K is cut into slabs, one program each. The program that finishes a block of tokens last adds up what the others left in
a fixed order, so that runs agree bit for bit, and rounds the sum.

Shapes: M tokens, K in_features, R rank (padded to whole blocks).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode import dot, permute_columns
from .factors import load_factor, sum_slabs
from .rounding import round_columns


# M changes from call to call: no new compilation for 1, or for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def project_kernel(
    x,  # [M, K], rows `x_stride` apart
    a_codes,  # [KP, RP] int8 or plain, or None
    a_exponents,  # [KP / a_block, RP] uint8, or None
    x_out,  # rounded, [M, K] or, in kernel order, [M, KP]; or None
    partial,  # [slabs, M, RP] float32, or None
    finished,  # int32, zero before and after, one a block of tokens and of ranks
    projection,  # [M, RP] rounded, or None
    M,
    K,
    x_stride,
    rank: tl.constexpr,  # RP, 0 without a low-rank branch
    a_rows: tl.constexpr,  # KP
    tile_k: tl.constexpr,  # of the kernel order that x_out is in; 0: natural order
    steps: tl.constexpr,  # of a slab
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    x_bits: tl.constexpr,  # 0: activations are not rounded
    x_block: tl.constexpr,
    x_ceil: tl.constexpr,
    a_block: tl.constexpr,
    slabs: tl.constexpr,
    chained: tl.constexpr,
):
    if chained:
        gdc_wait()
        gdc_launch_dependents()
    pid_m, pid_c, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows_M = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_R = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_inside = (rows_M < M)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    acc_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(pid_c * steps, pid_c * steps + steps):
        columns_T = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = row_inside & (columns_T < K)[None, :]
        x_MT = tl.load(x + rows_M.to(tl.int64)[:, None] * x_stride + columns_T[None, :], mask=inside, other=0.0)
        if x_bits > 0:
            x_MT = round_columns(x_MT.to(tl.float32), x_block, x_bits, x_ceil).to(dtype)
            if x_out is not None and pid_r == 0:
                if tile_k > 0:
                    ordered_MT = permute_columns(x_MT, tile_k)
                    place = x_out + rows_M.to(tl.int64)[:, None] * a_rows + columns_T[None, :]
                    tl.store(place, ordered_MT, mask=row_inside & (columns_T < a_rows)[None, :])
                else:
                    tl.store(x_out + rows_M.to(tl.int64)[:, None] * K + columns_T[None, :], x_MT, mask=inside)
        if rank > 0:
            a_TR = load_factor(a_codes, a_exponents, step * BLOCK_K, ranks_R, rank, a_rows, BLOCK_K, a_block, dtype)
            acc_MR = dot(x_MT, a_TR, acc_MR)
    if rank > 0:
        slab = tl.cast(M, tl.int64) * rank
        offset_MR = rows_M[:, None] * rank + ranks_R[None, :]
        if slabs > 1:
            tl.store(partial + pid_c * slab + offset_MR, acc_MR, mask=row_inside)
            # Every thread's part of the slab has to be out before this program counts as finished.
            tl.debug_barrier()
            counter = finished + pid_m * tl.num_programs(2) + pid_r
            if tl.atomic_add(counter, 1, sem="acq_rel") == slabs - 1:
                tl.store(counter, 0)
                xa_MR = sum_slabs(partial, offset_MR, row_inside, slab, slabs)
                store_projection(xa_MR, projection + offset_MR, row_inside, x_bits, x_block, x_ceil)
        else:
            store_projection(acc_MR, projection + offset_MR, row_inside, x_bits, x_block, x_ceil)


@triton.jit
def store_projection(xa_MR, place, inside, x_bits: tl.constexpr, x_block: tl.constexpr, x_ceil: tl.constexpr):
    if x_bits > 0:
        xa_MR = round_columns(xa_MR, x_block, x_bits, x_ceil)
    tl.store(place, xa_MR.to(place.dtype.element_ty), mask=inside)
