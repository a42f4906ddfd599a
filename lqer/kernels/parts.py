"""How a product whose sum is cut into parts ends: the program that finishes a tile of outputs last adds them up.

Parts are slabs in memory, added in a fixed order, so that runs agree bit for bit.

Shapes: M tokens, N out_features.
"""

import triton
import triton.language as tl


@triton.jit
def add_parts(
    acc_NM,  # float32, the part of this program
    partial,  # float32 [parts, N, M], or None for one part
    counter,  # int32, zero before and after, that of this tile of outputs
    part,  # number of this one
    bias,  # [N], or None
    y,  # [M, N]
    rows_N,
    rows_M,
    M,
    N,
    parts: tl.constexpr,
    at_once: tl.constexpr,  # parts that are loaded before they are added
):
    """y = the sum of all parts, and the bias, of a tile of outputs."""
    inside_NM = (rows_N < N)[:, None] & (rows_M < M)[None, :]
    last = True
    if parts > 1:
        slab = N * M
        offset_NM = rows_N[:, None] * M + rows_M[None, :]
        tl.store(partial + part * slab + offset_NM, acc_NM, mask=inside_NM)
        # Every thread's part of the slab has to be out before this program counts as finished.
        tl.debug_barrier()
        last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if last:
            tl.store(counter, 0)
            acc_NM = tl.zeros(acc_NM.shape, tl.float32)
            for first in range(0, parts, at_once):
                for i in tl.static_range(at_once):
                    place = partial + (first + i) * slab + offset_NM
                    acc_NM += tl.load(place, mask=inside_NM & (first + i < parts), other=0.0)
    if last:
        if bias is not None:
            acc_NM += tl.load(bias + rows_N, mask=rows_N < N, other=0.0).to(tl.float32)[:, None]
        tl.store(y + rows_M[None, :] * N + rows_N[:, None], acc_NM.to(y.dtype.element_ty), mask=inside_NM)
