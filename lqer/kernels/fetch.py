"""Codes are fetched to the L2 cache before they are loaded, a piece of memory by one instruction of one thread.

A load that is written early is not one that runs early: ptxas moves it down to where its registers become free.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def fetch_asm() -> str:
    """PTX: fetch $2 bytes from $1 on to the L2 cache, by the first thread, if $3 is 1."""
    return """{
.reg .pred first;
.reg .b32 thread;
mov.u32 thread, %tid.x;
setp.lt.s32 first, thread, $3;
@first cp.async.bulk.prefetch.L2.global [$1], $2;
mov.u32 $0, 0;
}"""


@triton.jit
def fetch_tiles(words, group, present, first_tile, end_tile, tiles: tl.constexpr, bits: tl.constexpr):
    """Have codes of a row group, from tile to tile, fetched to the L2 cache, if `present`; for one program."""
    tile_bytes: tl.constexpr = 256 * bits
    place = words.to(tl.int64) + (group.to(tl.int64) * tiles + first_tile) * tile_bytes
    size = (end_tile - first_tile) * tile_bytes
    tl.inline_asm_elementwise(
        fetch_asm(), "=r,l,r,r", [place, size, present.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )
