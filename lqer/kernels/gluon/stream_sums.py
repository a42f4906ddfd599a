"""Device functions of stream_gemm.py for its output tiles: which programs have parts of one, and their sum.

Shapes: M tokens, O rows of W.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lqer.kernels.gluon.stream_decode import ROWS_G

# Triton 3.6 has another name for this than later versions.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def piece(program, total):
    """The first of the turns of a program."""
    return program * total // gl.num_programs(0)


@gluon.jit
def _programs_of(tile, turns: gl.constexpr, total):
    """The first and the last program with turns of a tile."""
    programs = gl.num_programs(0)
    start = tile * turns
    return ((start + 1) * programs - 1) // total, ((start + turns) * programs - 1) // total


@gluon.jit
def _slot(program, tile, turns: gl.constexpr, total):
    """Where a program stores its part of a tile: in its second place if it began with a tile before."""
    return 2 * program + (piece(program, total) < tile * turns).to(gl.int32)


@gluon.jit
def add_parts(acc_OM, partial, finished, tile, turns: gl.constexpr, total):
    """Whether this program ends a tile, and then the sum of all its parts, [64, M]."""
    BLOCK_M: gl.constexpr = acc_OM.shape[1]
    mma: gl.constexpr = acc_OM.type.layout
    is_last = True
    from_program, to_program = _programs_of(tile, turns, total)
    if to_program > from_program:
        size: gl.constexpr = ROWS_G * BLOCK_M
        # Blocks of 8 x 8, one after the other: a warp's 256 bytes at once.
        rows_O = gl.arange(0, ROWS_G, gl.SliceLayout(1, mma))
        columns_M = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
        row_place_O = rows_O // 8 * (8 * BLOCK_M) + rows_O % 8 * 8
        place_OM = partial + gl.expand_dims(row_place_O, 1) + gl.expand_dims(columns_M // 8 * 64 + columns_M % 8, 0)
        gl.store(place_OM + _slot(gl.program_id(0), tile, turns, total) * size, acc_OM)
        # All threads must have stored their elements before the counter is incremented.
        barrier()
        is_last = gl.atomic_add(finished + tile, 1, sem="acq_rel") == to_program - from_program
        if is_last:
            gl.store(finished + tile, 0)
            acc_OM = gl.zeros([ROWS_G, BLOCK_M], gl.float32, mma)
            # Two parts are loaded before the first is added, where registers hold both.
            ahead: gl.constexpr = 2 if BLOCK_M <= 64 else 1
            for program in range(from_program, to_program + 1, ahead):
                first_place_OM = place_OM + _slot(program, tile, turns, total) * size
                second_place_OM = place_OM + _slot(program + 1, tile, turns, total) * size
                first_OM = gl.load(first_place_OM)
                if ahead == 2:
                    second_OM = gl.load(second_place_OM, mask=program < to_program, other=0.0)
                acc_OM += first_OM
                if ahead == 2:
                    acc_OM += second_OM
    return is_last, acc_OM
