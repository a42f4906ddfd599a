"""Split-K: how programs that each sum a part of K make one output tile, without a second kernel.

Every program stores its partial sum in memory and counts itself. The one that finishes a tile last adds all partial
sums in a fixed order, so that results are reproducible bit for bit, and resets the counter to zero.

Shapes: M tokens, O out_features.
"""

import triton
import triton.language as tl


@triton.jit
def store_partial(
    acc,  # float32, the partial sum of this program
    partial,  # float32 [splits, ..]
    offset,  # of each element of the tile in one of the splits
    inside,
    size,  # elements of a split
    counter,  # int32, of this tile, zero before and after
    split,
    splits: tl.constexpr,
):
    """Store a partial sum; whether all others of the tile are stored as well."""
    tl.store(partial + split * size + offset, acc, mask=inside)
    # All threads must have stored their elements before this program counts itself.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1


@triton.jit
def sum_partials(
    acc,  # only its shape is used
    partial,
    offset,
    inside,
    size,
    counter,
    splits: tl.constexpr,
    at_once: tl.constexpr,  # partial sums that are loaded before they are added
):
    """The sum of a tile over all splits, float32, by the program for which `store_partial` was true."""
    tl.store(counter, 0)
    total = tl.zeros(acc.shape, tl.float32)
    for first in range(0, splits, at_once):
        for i in tl.static_range(at_once):
            place = partial + (first + i) * size + offset
            total += tl.load(place, mask=inside & (first + i < splits), other=0.0)
    return total


@triton.jit
def finish_tile(
    acc_OM,  # float32, the partial sum of this program
    partial,  # float32 [splits, O, M], or None for one split
    counter,  # int32, of this tile, zero before and after
    split,
    bias,  # [O], or None
    y,  # [M, O]
    rows_O,
    rows_M,
    M,
    N,
    splits: tl.constexpr,
    at_once: tl.constexpr,  # partial sums that are loaded before they are added
):
    """y = the sum over all splits and the bias, of a tile of outputs; written by its last program."""
    inside_OM = (rows_O < N)[:, None] & (rows_M < M)[None, :]
    last = True
    if splits > 1:
        size = N * M
        offset_OM = rows_O[:, None] * M + rows_M[None, :]
        last = store_partial(acc_OM, partial, offset_OM, inside_OM, size, counter, split, splits)
        if last:
            acc_OM = sum_partials(acc_OM, partial, offset_OM, inside_OM, size, counter, splits, at_once)
    if last:
        if bias is not None:
            acc_OM += tl.load(bias + rows_O, mask=rows_O < N, other=0.0).to(tl.float32)[:, None]
        tl.store(y + rows_M[None, :] * N + rows_O[:, None], acc_OM.to(y.dtype.element_ty), mask=inside_OM)
