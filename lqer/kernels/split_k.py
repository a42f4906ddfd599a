"""Split-K: how programs that each sum a part of K compute one output tile without a second kernel.

Every program stores its partial sum in memory and increments the tile's counter. The last one adds all partial sums in
a fixed order, so that results are reproducible bit for bit, and resets the counter to zero.

Shapes: M tokens, O out_features.
"""

import triton
import triton.language as tl


@triton.jit
def store_partial(
    acc,  # float32, the partial sum of this program
    partial,  # float32 [splits, size]
    offset,  # of the tile's elements within a split
    inside,  # mask of the tile's elements
    size,  # elements of a split
    counter,  # int32, of this tile
    split,
    splits: tl.constexpr,
):
    """Store a partial sum; true for the program that stores the tile's last one."""
    tl.store(partial + split * size + offset, acc, mask=inside)
    # All threads must have stored their elements before the counter is incremented.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1


@triton.jit
def sum_partials(
    acc,  # gives the shape
    partial,
    offset,
    inside,
    size,
    counter,
    splits: tl.constexpr,
    at_once: tl.constexpr,  # partial sums that are loaded before any is added
):
    """The sum over all splits, float32; for the program for which `store_partial` was true."""
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
    residual,  # [M, O], or None
    y,  # [M, O]
    rows_O,
    rows_M,
    M,
    N,
    splits: tl.constexpr,
    at_once: tl.constexpr,  # partial sums that are loaded before any is added
):
    """Write y = sum over all splits + bias + residual of an output tile, in the program that finishes last."""
    offset_OM = rows_O[:, None] * M + rows_M[None, :]
    inside_OM = (rows_O < N)[:, None] & (rows_M < M)[None, :]
    _finish(
        acc_OM,
        partial,
        offset_OM,
        inside_OM,
        N * M,
        counter,
        split,
        bias,
        residual,
        y,
        rows_O,
        rows_M,
        M,
        N,
        splits,
        at_once,
    )


@triton.jit
def finish_tile_of_blocks(
    acc_OM,
    partial,  # float32 [splits, tiles, tile], or None for one split
    tile,
    tiles,
    counter,
    split,
    bias,
    residual,
    y,
    rows_O,
    rows_M,
    M,
    N,
    splits: tl.constexpr,
    at_once: tl.constexpr,
):
    """The same for accumulators of tensor cores, of which a warp holds blocks of 8 x 8: their partial sums adjoin."""
    rows: tl.constexpr = acc_OM.shape[0]
    columns: tl.constexpr = acc_OM.shape[1]
    in_O, in_M = tl.arange(0, rows), tl.arange(0, columns)
    offset_OM = (in_O // 8 * (8 * columns) + in_O % 8 * 8)[:, None] + (in_M // 8 * 64 + in_M % 8)[None, :]
    offset_OM += tile * (rows * columns)
    # All of the tile, so that two elements are stored at once whatever M is.
    whole_OM = tl.full(acc_OM.shape, True, tl.int1)
    size = tiles * (rows * columns)
    _finish(
        acc_OM,
        partial,
        offset_OM,
        whole_OM,
        size,
        counter,
        split,
        bias,
        residual,
        y,
        rows_O,
        rows_M,
        M,
        N,
        splits,
        at_once,
    )


@triton.jit
def _finish(
    acc_OM,
    partial,
    offset_OM,  # of the tile's elements within a split
    stored_OM,  # which of these are
    size,  # elements of a split
    counter,
    split,
    bias,
    residual,
    y,
    rows_O,
    rows_M,
    M,
    N,
    splits: tl.constexpr,
    at_once: tl.constexpr,
):
    inside_OM = (rows_O < N)[:, None] & (rows_M < M)[None, :]
    place_OM = rows_M[None, :] * N + rows_O[:, None]
    last = True
    if splits > 1:
        last = store_partial(acc_OM, partial, offset_OM, stored_OM, size, counter, split, splits)
    if last:
        if residual is not None:
            # Loaded here to hide its latency behind the partial sums.
            residual_OM = tl.load(residual + place_OM, mask=inside_OM, other=0.0)
        if splits > 1:
            acc_OM = sum_partials(acc_OM, partial, offset_OM, stored_OM, size, counter, splits, at_once)
        if bias is not None:
            acc_OM += tl.load(bias + rows_O, mask=rows_O < N, other=0.0).to(tl.float32)[:, None]
        if residual is not None:
            acc_OM += residual_OM.to(tl.float32)
        tl.store(y + place_OM, acc_OM.to(y.dtype.element_ty), mask=inside_OM)
