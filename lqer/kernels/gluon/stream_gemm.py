"""Kernel that multiplies four-bit codes with 33 to 128 tokens, in Gluon, for compute capability 9.0.

Warps have roles. One copies: tokens, words and scales of a step of 128 columns by the tensor memory accelerator (TMA)
to a stage of shared memory, as many steps ahead as there are stages; what lies beyond the last row, column or token is
zero. Four warps multiply: they decode 64 rows in registers, as the operand of wgmma. Programs share a
multiprocessor: while the warps of one wait for tensor cores to take their operands, those of the other decode.

PTX forbids to write registers that a product still reads, and the compiler waits for each product if a loop may do so:
so a turn of the loop has two products, of two steps, whose operands are two variables.

The turns of all output tiles are one line, which is cut into as many pieces as there are programs: each has the same
work, to a turn, and a tile is multiplied by one program or by several, one after the other in the line. Sums of parts
of a tile are stored; the program that stores a tile's last part adds all in the order of the line (stream_sums.py).

Shapes: M tokens, O rows of W, C columns of a step; J words of a row in it.
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
from lqer.kernels.gluon.stream_decode import ROWS_G, WARPS_G, bytes_of, has_zeros, load, steps_per_unit
from lqer.kernels.gluon.stream_sums import add_parts, barrier, piece

# Triton 3.6 has another name for this than later versions.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
COPIER_REGISTERS = gl.constexpr(24)


@gluon.constexpr_function
def turns_of(layout) -> int:
    """Turns of a tile, two steps each."""
    return (steps_of(layout) + 1) // 2


@gluon.jit
def _next(stage, phase, stages: gl.constexpr):
    """The stage after this one, and the phase of its barrier."""
    is_last = stage == stages - 1
    return gl.where(is_last, 0, stage + 1), phase ^ is_last.to(gl.int32)


@gluon.jit
def _previous(stage, stages: gl.constexpr):
    return gl.where(stage == 0, stages - 1, stage - 1)


@gluon.jit
def _place(first, number, tiles_m, layout: gl.constexpr):
    """The tile of rows, the tile of tokens and the step of K of step `number` of the line from turn `first` on."""
    turns: gl.constexpr = turns_of(layout)
    turn = first + number // 2
    tile = turn // turns
    return tile // tiles_m, tile % tiles_m, turn % turns * 2 + number % 2


@gluon.jit
def _copy_weights(weights, tiles, full, stage, row_tile, step, inside, layout: gl.constexpr):
    """Copy the words, scales and zero points of a step to a stage."""
    words, scales, zeros = weights
    _, word_tiles, scale_tiles, zero_tiles = tiles
    unit = step // steps_per_unit(layout)
    group = row_tile * (ROWS_G // 16)
    async_load(words, [group, step * 8, 0], full, word_tiles.index(stage), pred=inside)
    async_load(scales, [group, unit, 0], full, scale_tiles.index(stage), pred=inside)
    if has_zeros(layout):
        async_load(zeros, [group, unit, 0], full, zero_tiles.index(stage), pred=inside)


@gluon.jit
def _copy(
    x, weights, tiles, ready, free, first, end, tiles_m, layout: gl.constexpr, stages: gl.constexpr, pdl: gl.constexpr,
):  # fmt: skip
    """Copy all steps of the turns from `first` to `end`, and one more, which is decoded and not multiplied."""
    steps = 2 * (end - first) + 1
    words, scales, zeros = weights
    of_zeros: gl.constexpr = bytes_of(zeros) if has_zeros(layout) else 0
    size: gl.constexpr = bytes_of(x) + bytes_of(words) + bytes_of(scales) + of_zeros
    BLOCK_M: gl.constexpr = x.block_shape[0]
    # Weights do not depend on the kernel before this one.
    for stage in gl.static_range(stages):
        row_tile, _, step = _place(first, stage, tiles_m, layout)
        inside = stage < steps
        mbarrier.expect(ready.index(stage), size, pred=inside)
        _copy_weights(weights, tiles, ready.index(stage), stage, row_tile, step, inside, layout)
    if pdl:
        gdc_wait()
    for stage in gl.static_range(stages):
        _, token_tile, step = _place(first, stage, tiles_m, layout)
        place = [token_tile * BLOCK_M, step * COLUMNS_G]
        async_load(x, place, ready.index(stage), tiles[0].index(stage), pred=stage < steps)
    stage = 0
    phase = 0
    for number in range(stages, steps):
        row_tile, token_tile, step = _place(first, number, tiles_m, layout)
        mbarrier.wait(free.index(stage), phase)
        full = ready.index(stage)
        mbarrier.expect(full, size)
        async_load(x, [token_tile * BLOCK_M, step * COLUMNS_G], full, tiles[0].index(stage))
        _copy_weights(weights, tiles, full, stage, row_tile, step, True, layout)
        stage, phase = _next(stage, phase, stages)


@gluon.jit
def _release(free, stage, pred):
    """Let a stage be copied to, once all warps that multiply are done with it."""
    barrier()
    mbarrier.arrive(free.index(stage), pred=pred)


@gluon.jit
def _take(
    tiles, ready, stage, phase, odd, layout: gl.constexpr, dtype: gl.constexpr, operand: gl.constexpr,
):  # fmt: skip
    """Wait for a stage and decode 64 rows of it. odd: whether its step is the second of a strip."""
    mbarrier.wait(ready.index(stage), phase)
    _, word_tiles, scale_tiles, zero_tiles = tiles
    words_OJ, scales, zeros = load(
        word_tiles.index(stage), scale_tiles.index(stage), zero_tiles.index(stage), odd, layout
    )
    return decode(words_OJ, scales, zeros, layout, dtype, operand)


@gluon.jit
def _multiply(
    tiles, ready, free, bias, partial, finished, y, M, N, first, end, tiles_m, total,
    layout: gl.constexpr, stages: gl.constexpr, adds: gl.constexpr,
):  # fmt: skip
    """Multiply the turns from `first` to `end` of the line, and write the tiles that end there."""
    x_tiles, _, _, _ = tiles
    dtype: gl.constexpr = x_tiles.dtype
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS_G, 1], [16, BLOCK_M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    turns: gl.constexpr = turns_of(layout)
    stage = 0
    phase = 0
    even_OC = _take(tiles, ready, stage, phase, 0, layout, dtype, operand)
    turn = first
    while turn < end:
        tile = turn // turns
        last = gl.minimum(end, (tile + 1) * turns)
        acc_OM = gl.zeros([ROWS_G, BLOCK_M], gl.float32, mma)
        for at in range(turn, last):
            acc_OM = warpgroup_mma(even_OC, x_tiles.index(stage).permute((1, 0)), acc_OM, is_async=True)
            # The product before this one is done, of an earlier turn of this tile.
            acc_OM = warpgroup_mma_wait(1, deps=[acc_OM])
            _release(free, _previous(stage, stages), at > turn)
            even_stage = stage
            stage, phase = _next(stage, phase, stages)
            odd_OC = _take(tiles, ready, stage, phase, 1, layout, dtype, operand)
            acc_OM = warpgroup_mma(odd_OC, x_tiles.index(stage).permute((1, 0)), acc_OM, is_async=True)
            acc_OM = warpgroup_mma_wait(1, deps=[acc_OM])
            _release(free, even_stage, True)
            stage, phase = _next(stage, phase, stages)
            # Of the next turn, maybe of the next tile.
            even_OC = _take(tiles, ready, stage, phase, 0, layout, dtype, operand)
        acc_OM = warpgroup_mma_wait(0, deps=[acc_OM])
        _release(free, _previous(stage, stages), True)
        is_last, acc_OM = add_parts(acc_OM, partial, finished, tile, turns, total)
        if is_last:
            write(acc_OM, bias, y, tile // tiles_m * ROWS_G, tile % tiles_m * BLOCK_M, M, N, adds)
        turn = last


@gluon.constexpr_function
def _shape_of(block, count: int) -> list[int]:
    return [count, *block.block_shape]


@gluon.jit
def _allocate(block, count: gl.constexpr):
    """Shared memory of so many blocks."""
    return gl.allocate_shared_memory(block.dtype, _shape_of(block, count), block.layout)


# M changes from call to call: do not compile anew for 1 and for multiples of 16.
@gluon.jit(do_not_specialize=["M", "tiles_m", "total"])
def stream_kernel(
    x,  # descriptor of tokens [M, IP], in the order of decoded columns
    words,  # descriptors of these three [row groups, lines or units, ..], as in layout/groups.py or layout/codes.py
    scales,
    zeros,  # the same as scales, if there are none
    bias,  # [O], or None
    partial,  # [programs, 2, tile] float32
    finished,  # int32, a counter per output tile, zero before and after
    y,  # [M, O]; with a branch, it holds that before
    M,
    N,
    tiles_m,  # tiles of tokens
    total,  # turns of all tiles
    layout: gl.constexpr,
    stages: gl.constexpr,
    adds: gl.constexpr,  # to what y holds
    pdl: gl.constexpr,
):
    """A program's piece of the line of turns."""
    first, end = piece(gl.program_id(0), total), piece(gl.program_id(0) + 1, total)
    scale_tiles = _allocate(scales, stages)
    zero_tiles = scale_tiles
    if has_zeros(layout):
        zero_tiles = _allocate(zeros, stages)
    tiles = (_allocate(x, stages), _allocate(words, stages), scale_tiles, zero_tiles)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    barrier()
    weights = (words, scales, zeros)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    tiles, ready, free, bias, partial, finished, y, M, N, first, end, tiles_m, total,
                    layout, stages, adds,
                ),
            ),
            (_copy, (x, weights, tiles, ready, free, first, end, tiles_m, layout, stages, pdl)),
        ],
        [1],
        [COPIER_REGISTERS],
    )  # fmt: skip
