"""Device functions that multiply trellis codes of table "bytes" with tokens held in registers (resident_ptx.py).

A warp has a few tiles of 128 columns. It loads the tokens of these once, as operands of tensor cores, and then goes
through rows: all that it waits for are codes. It loads these one row group ahead; but ptxas moves loads down to where
registers become free, in the middle of the row group before or later, so the program has them fetched to the L2 cache
some row groups ahead. The warps of a program share out the columns, and leave their sums of each row group in shared
memory, where they are added.

Shapes: T threads of a program. Codes, tokens and sums are tuples of tensors [T].
"""

import triton
import triton.language as tl

from lqer.kernels.halves import BLOCK_HALVES_C
from lqer.kernels.trellis.byte_sums import load_tokens as load_bytes
from lqer.kernels.trellis.decode import load_constraints, types
from lqer.kernels.trellis.resident_ptx import (
    HALVES,
    add_asm,
    bytes_asm,
    bytes_constraints,
    halves_asm,
    halves_constraints,
    leave_asm,
    leave_constraints,
    reserve_asm,
    spread_asm,
    start_asm,
    start_constraints,
    tokens_asm,
)

HALVES_C = tl.constexpr(HALVES)


@triton.jit
def load_integers(x, steps, lane_T, tile_T, first_T, end, M, layout: tl.constexpr, tiles: tl.constexpr):
    """Up to four tokens, of `tiles` tiles from tile_T on: 33 tensors of each; zero outside first_T to end."""
    loaded = load_bytes(x, steps, lane_T, tile_T, M, layout.tiles)
    step_T = tl.where((tile_T >= first_T) & (tile_T < end), loaded[8], 0)
    tokens = tl.inline_asm_elementwise(
        spread_asm(), load_constraints(33, 0) + ",r" * 9, loaded[:8] + (step_T,),  # noqa: RUF005
        dtype=types(tl.int32, 33), is_pure=False, pack=1,
    )  # fmt: skip
    tokens = tokens[:32] + (tokens[32].to(tl.float32, bitcast=True),)  # noqa: RUF005
    if tiles == 1:
        return tokens
    else:
        return tokens + load_integers(x, steps, lane_T, tile_T + 1, first_T, end, M, layout, tiles - 1)


@triton.jit
def load_halves(
    x, lane_T, block, tile_T, first_T, end, layout: tl.constexpr, tiles: tl.constexpr, blocks: tl.constexpr
):
    """8 `blocks` tokens from block `block` on, of `tiles` tiles from tile_T on; zero outside first_T to end."""
    place_T = x + (block * layout.tiles + tile_T) * BLOCK_HALVES_C + lane_T * 8
    present_T = ((tile_T >= first_T) & (tile_T < end)).to(tl.int32)
    tokens = tl.inline_asm_elementwise(
        tokens_asm(layout, blocks), load_constraints(HALVES_C * blocks, 1) + ",r", (place_T.to(tl.int64), present_T),
        dtype=types(tl.int32, HALVES_C * blocks), is_pure=False, pack=1,
    )  # fmt: skip
    if tiles == 1:
        return tokens
    else:
        return tokens + load_halves(x, lane_T, block, tile_T + 1, first_T, end, layout, tiles - 1, blocks)


@triton.jit
def what_follows(tokens, lane_T, tiles: tl.constexpr, blocks: tl.constexpr):
    """Operands of `multiply_halves` after codes and tokens, the same for all row groups."""
    even_T = tl.where(lane_T // 4 == lane_T % 4 * 2, 0x01010101, 0)
    odd_T = tl.where(lane_T // 4 == lane_T % 4 * 2 + 1, 0x01010101, 0)
    starts = tl.inline_asm_elementwise(
        start_asm(tiles, blocks), start_constraints(tiles, blocks), tokens,
        dtype=types(tl.float32, 2 * blocks), is_pure=False, pack=1,
    )  # fmt: skip
    return (even_T, odd_T) + starts  # noqa: RUF005


@triton.jit
def multiply_integers(codes, tokens, layout: tl.constexpr, tiles: tl.constexpr):
    """Sums of a row group, two of each thread. tokens: of `load_integers`."""
    return tl.inline_asm_elementwise(
        bytes_asm(layout, tiles), bytes_constraints(layout, tiles), codes + tokens,
        dtype=types(tl.float32, 2), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def multiply_halves(codes, tokens, others, layout: tl.constexpr, tiles: tl.constexpr, blocks: tl.constexpr):
    """Sums of a row group, 4 `blocks` of each thread. tokens: of `load_halves`; others: of `what_follows`."""
    return tl.inline_asm_elementwise(
        halves_asm(layout, tiles, blocks), halves_constraints(layout, tiles, blocks), codes + tokens + others,
        dtype=types(tl.float32, 4 * blocks), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def reserve(size: tl.constexpr):
    """The address of shared memory for the sums of warps."""
    return tl.inline_asm_elementwise(
        reserve_asm("sums_of_warps", size), "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def leave_integers(sums, place_T, stored_T):
    """Store the two sums of a thread where stored_T is true."""
    arguments = sums + (place_T, stored_T.to(tl.int32))  # noqa: RUF005
    tl.inline_asm_elementwise(leave_asm(2), "=r,f,f,r,r", arguments, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def leave_halves(sums, place_T, count: tl.constexpr):
    """Store the sums of a thread, those of each eight tokens 512 bytes apart."""
    arguments = sums + (place_T,)  # noqa: RUF005
    tl.inline_asm_elementwise(
        leave_asm(count), leave_constraints(count), arguments, dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def add_warps(place, warps: tl.constexpr, stride: tl.constexpr):
    """The sums of all warps; place: addresses of those of the first one."""
    return tl.inline_asm_elementwise(add_asm(warps, stride), "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1)
