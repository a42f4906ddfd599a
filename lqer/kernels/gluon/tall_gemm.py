"""Kernel that multiplies four-bit codes with more than 128 tokens, in Gluon, for compute capability 9.0.

A program has 128 rows of W, and multiplies 128 columns at a time. Triton waits for a product whose operand comes from
registers before it decodes the next one; here the next step is decoded while tensor cores multiply the one before.
Tokens come by the tensor memory accelerator (TMA), which also fills up the last tile with zeros; words are loaded into
registers two steps ahead, and fetched to the L2 cache earlier.

The first `whole` output tiles have a program each. K of the others, which would leave multiprocessors without work, is
split over `splits` programs: a first part of `long` turns, and equal parts of the rest. All first parts come before all
others, so that short parts of two tiles, one after the other, can take a multiprocessor as long as one first part.

PTX forbids to write registers that a product still reads, and the compiler waits for each product if a loop may do so:
so a turn of the loop has two steps, whose operands are two variables.

Shapes: M tokens, O rows of W, C columns of a step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from lqer.kernels.gluon.decode import COLUMNS_G, decode, steps_of, write
from lqer.kernels.gluon.stream_sums import barrier
from lqer.kernels.gluon.tall_decode import ROWS_G, load, prefetch

# Triton 3.6 has another name for this than later versions.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
AHEAD = gl.constexpr(8)  # steps whose words are fetched to the L2 cache


@gluon.jit
def _copy(x, x_tiles, ready, stage, first_token, step, end, BLOCK_M: gl.constexpr):
    """Copy the tokens of step `step` to a stage, if the program multiplies them."""
    inside = step < end
    mbarrier.expect(ready.index(stage), BLOCK_M * COLUMNS_G * 2, pred=inside)
    async_load(x, [first_token, step * COLUMNS_G], ready.index(stage), x_tiles.index(stage), pred=inside)


@gluon.jit
def _next(stage, phase, stages: gl.constexpr):
    """The stage after this one, and the phase of its barrier."""
    is_last = stage == stages - 1
    return gl.where(is_last, 0, stage + 1), phase ^ is_last.to(gl.int32)


@gluon.jit
def _refill(x, x_tiles, ready, stage, first_token, step, end, BLOCK_M: gl.constexpr, stages: gl.constexpr):
    """While step `step` is multiplied from `stage`: copy to the stage before, with which all are done."""
    # All warps.
    barrier()
    freed = gl.where(stage == 0, stages - 1, stage - 1)
    _copy(x, x_tiles, ready, freed, first_token, step + stages - 1, end, BLOCK_M)


@gluon.jit
def _start_of_part(part, turns: gl.constexpr, splits: gl.constexpr, long: gl.constexpr):
    """The first turn of a part of a split tile."""
    return gl.where(part == 0, 0, long + (part - 1) * (turns - long) // (splits - 1))


# M changes from call to call: do not compile anew for 1 and for multiples of 16.
@gluon.jit(do_not_specialize=["M", "whole"])
def tall_kernel(
    x,  # descriptor of tokens [M, IP], in the order of decoded columns
    words,  # these three as in layout/groups.py or layout/codes.py
    scales,
    zeros,
    bias,  # [O], or None
    partial,  # [tiles - whole, splits, 128 BLOCK_M] float32, or None
    finished,  # int32, a counter per output tile, zero before and after
    y,  # [M, O]; with a branch, it holds that before
    M,
    N,
    tiles_n,
    whole,
    layout: gl.constexpr,
    BLOCK_M: gl.constexpr,
    splits: gl.constexpr,
    long: gl.constexpr,  # turns of the first part of a split tile
    stages: gl.constexpr,
    adds: gl.constexpr,  # to what y holds
    pdl: gl.constexpr,
):
    """An output tile of 128 rows and BLOCK_M tokens, or a split of one."""
    dtype: gl.constexpr = x.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    pid = gl.program_id(0)
    turns: gl.constexpr = (steps_of(layout) + 1) // 2
    tile = pid
    pid_s = 0
    first = 0
    end = turns
    is_split = pid >= whole
    if splits > 1:
        split_tiles = (gl.num_programs(0) - whole) // splits
        if is_split:
            pid_s = (pid - whole) // split_tiles
            tile = whole + (pid - whole) % split_tiles
            first = _start_of_part(pid_s, turns, splits, long)
            end = _start_of_part(pid_s + 1, turns, splits, long)
    first_row = tile % tiles_n * ROWS_G
    first_token = tile // tiles_n * BLOCK_M

    x_tiles = gl.allocate_shared_memory(dtype, [stages, BLOCK_M, COLUMNS_G], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    barrier()
    end *= 2
    step = first * 2
    even_words, even_scales, even_zeros = load(words, scales, zeros, first_row, step, N, layout)
    odd_words, odd_scales, odd_zeros = load(words, scales, zeros, first_row, step + 1, N, layout)
    for ahead in gl.static_range(2, AHEAD):
        prefetch(words, scales, zeros, first_row, step + ahead, N, layout)
    if pdl:
        gdc_wait()
    for stage in gl.static_range(stages - 1):
        _copy(x, x_tiles, ready, stage, first_token, step + stage, end, BLOCK_M)
    even_OC = decode(even_words, even_scales, even_zeros, layout, dtype, operand)
    acc_OM = gl.zeros([ROWS_G, BLOCK_M], gl.float32, mma)
    stage = 0
    phase = 0
    for step in range(first * 2, end, 2):
        mbarrier.wait(ready.index(stage), phase)
        acc_OM = warpgroup_mma(even_OC, x_tiles.index(stage).permute((1, 0)), acc_OM, is_async=True)
        acc_OM = warpgroup_mma_wait(1, deps=[acc_OM])
        _refill(x, x_tiles, ready, stage, first_token, step, end, BLOCK_M, stages)
        prefetch(words, scales, zeros, first_row, step + AHEAD, N, layout)
        even_words, even_scales, even_zeros = load(words, scales, zeros, first_row, step + 2, N, layout)
        odd_OC = decode(odd_words, odd_scales, odd_zeros, layout, dtype, operand)
        stage, phase = _next(stage, phase, stages)
        mbarrier.wait(ready.index(stage), phase)
        acc_OM = warpgroup_mma(odd_OC, x_tiles.index(stage).permute((1, 0)), acc_OM, is_async=True)
        acc_OM = warpgroup_mma_wait(1, deps=[acc_OM])
        _refill(x, x_tiles, ready, stage, first_token, step + 1, end, BLOCK_M, stages)
        prefetch(words, scales, zeros, first_row, step + 1 + AHEAD, N, layout)
        odd_words, odd_scales, odd_zeros = load(words, scales, zeros, first_row, step + 3, N, layout)
        even_OC = decode(even_words, even_scales, even_zeros, layout, dtype, operand)
        stage, phase = _next(stage, phase, stages)
    acc_OM = warpgroup_mma_wait(0, deps=[acc_OM])
    # Of all warps: what follows uses the shared memory of the tokens again.
    barrier()

    rows_O = gl.arange(0, ROWS_G, gl.SliceLayout(1, mma))
    columns_M = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    is_last = pid < whole
    if splits > 1:
        if is_split:
            size: gl.constexpr = ROWS_G * BLOCK_M
            place_OM = partial + (tile - whole) * (splits * size)
            # Blocks of 8 x 8, one after the other: a warp's 256 bytes at once.
            row_place_O = rows_O // 8 * (8 * BLOCK_M) + rows_O % 8 * 8
            place_OM += gl.expand_dims(row_place_O, 1) + gl.expand_dims(columns_M // 8 * 64 + columns_M % 8, 0)
            # The last one keeps its sum in registers, if it sees that it is.
            if gl.load(finished + tile, volatile=True) < splits - 1:
                gl.store(place_OM + pid_s * size, acc_OM)
            # All threads must have stored their elements before the counter is incremented.
            barrier()
            is_last = gl.atomic_add(finished + tile, 1, sem="acq_rel") == splits - 1
            if is_last:
                gl.store(finished + tile, 0)
                own_OM = acc_OM
                acc_OM = gl.load(place_OM, mask=pid_s > 0, other=own_OM)
                for part in gl.static_range(1, splits):
                    acc_OM += gl.load(place_OM + part * size, mask=pid_s != part, other=own_OM)
    if is_last:
        write(acc_OM, bias, y, first_row, first_token, M, N, adds)
