"""Device functions that multiply lattice codes with 5 to 32 tokens in float16 (halves.py).

A weight is decoded once, in registers, for all tokens of a program: a nibble n goes into a float16 above a bit that is
one, 2 n + 1, from which 16 is subtracted, four times the coordinate n / 2 - 15/4. Values are exact.

Shapes: M tokens, O rows of W, T threads of a program, K its warps along the columns. Sums and codes are tuples of
tensors [T].
"""

import triton
import triton.language as tl

from lqer.kernels.halves import BLOCK_HALVES, BLOCK_HALVES_C, LOAD_BYTES, LOADS, MULTIPLY_HALVES
from lqer.kernels.lattice.decode import index_asm, load_units, sign_asm
from lqer.kernels.trellis.byte_sums import joined
from lqer.kernels.trellis.decode import types

UNIT = tl.constexpr(0.25)  # of the decoded numbers


@triton.constexpr_function
def lattice_asm(q: int, j: int, units: list[str], table: str) -> list[str]:
    """PTX: a(8 q) to a(8 q + 7) = operands of row group q for load j: code j of either row."""
    lines = []
    for row in range(2):
        names = [f"{name}{q}_{row}" for name in ("low", "b", "z", "y")]
        if j == 0:
            lines += sign_asm(units[row], *names)
        lines += index_asm(j, table, *names)
        # (w ^ s), all coordinates
        lines += ["xor.b32 w, w, s;", "shl.b32 t, w, 1;", "shr.u32 w, w, 7;"]
        for p in range(4):
            source, up = "ttww"[p], p % 2 * 4
            target = f"a{8 * q + 2 * p + row}"
            # (source & mask) | 1024 + the bit below
            lines.append(
                f"lop3.b32 {target}, {source}, 0x{0x001E001E << up:X}, 0x{0x64006400 | 0x00010001 << up:X}, 0xEA;"
            )
            # 2 n + 1 - 16, or a sixteenth of 1024 + 32 n + 16, less 80.
            lines.append(f"fma.rn.f16x2 {target}, {target}, {'part' if up else 'unit'}, {'away' if up else 'offset'};")
    return lines


@triton.constexpr_function
def tile_asm(tiles: int, groups: int, blocks: int) -> str:
    """PTX: add the products of a tile of `groups` row groups and 8 `blocks` tokens to a warp's sums.

    Outputs $(4 (blocks q + i) + 2 h + e): the sum of row g + 8 h of row group q and token 2 t + e of block i. Inputs:
    the same sums before, the two units of each row group, the addresses of a lane's first load and of its table. tiles:
    of the weight.
    """
    sums = 4 * groups * blocks
    x, table = f"${2 * sums + 2 * groups}", f"${2 * sums + 2 * groups + 1}"
    lines = [
        '.pragma "nounroll";',
        f".reg .b32 t, w, s, unit, offset, part, away, a<{8 * groups}>, x<{4 * blocks}>;",
    ]
    for q in range(groups):
        for row in range(2):
            lines.append(".reg .b32 " + ", ".join(f"{name}{q}_{row}" for name in ("low", "b", "z", "y")) + ";")
    # Pairs of float16: 1, -1040, 1 / 16 and -80.
    for name, value in zip(("unit", "offset", "part", "away"), (0x3C00, 0xE410, 0x2C00, 0xD500), strict=True):
        lines.append(f"mov.b32 {name}, 0x{value * 0x10001:X};")
    lines += [f"mov.b32 ${n}, ${sums + n};" for n in range(sums)]
    for j in range(LOADS):
        for i in range(blocks):
            loaded = ", ".join(f"x{4 * i + n}" for n in range(4))
            lines.append(f"ld.global.v4.b32 {{{loaded}}}, [{x}+{2 * BLOCK_HALVES * tiles * i + LOAD_BYTES * j}];")
        for q in range(groups):
            lines += lattice_asm(q, j, [f"${2 * sums + 2 * q + row}" for row in range(2)], table)
        for step in range(2):
            for q in range(groups):
                a = "{" + ", ".join(f"a{8 * q + 4 * step + n}" for n in range(4)) + "}"
                for i in range(blocks):
                    d = "{" + ", ".join(f"${4 * (blocks * q + i) + n}" for n in range(4)) + "}"
                    x_regs = f"{{x{4 * i + 2 * step}, x{4 * i + 2 * step + 1}}}"
                    lines.append(f"{MULTIPLY_HALVES} {d}, {a}, {x_regs}, {d};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def tile_constraints(groups: int, blocks: int) -> str:
    sums = 4 * groups * blocks
    return ",".join(["=&f"] * sums + ["f"] * sums + ["l"] * (2 * groups + 1) + ["r"])


@triton.jit
def load_groups_of_units(units, group_T, lane_T, tile, last, tiles: tl.constexpr, groups: tl.constexpr):
    """The units of each thread, of a tile of `groups` row groups from group_T on; the last one instead of any after."""
    if groups == 1:
        return load_units(units, tl.minimum(group_T, last), lane_T, tile, tiles, 1)
    else:
        half: tl.constexpr = groups // 2
        others = load_groups_of_units(units, group_T + half, lane_T, tile, last, tiles, half)
        return load_groups_of_units(units, group_T, lane_T, tile, last, tiles, half) + others


@triton.jit
def no_sums(lane_T, fours: tl.constexpr):
    """Initial sums of `add_tile`: four zeros per thread for each row group and eight tokens."""
    if fours == 1:
        zero_T = tl.zeros(lane_T.shape, tl.float32)
        return zero_T, zero_T, zero_T, zero_T
    else:
        half = no_sums(lane_T, fours // 2)
        return half + half


@triton.jit
def add_tile(sums, codes, x, lane_T, tile, copy_T, tiles: tl.constexpr, groups: tl.constexpr, blocks: tl.constexpr):
    """`sums` + the products of a tile of row groups. codes: of `load_groups_of_units`; copy_T: the lane's table."""
    place_T = (x + tile * BLOCK_HALVES_C + lane_T * 8).to(tl.int64)
    return tl.inline_asm_elementwise(
        tile_asm(tiles, groups, blocks), tile_constraints(groups, blocks), sums + codes + (place_T, copy_T),
        dtype=types(tl.float32, 4 * groups * blocks), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def sums_tile(sums, warps_k: tl.constexpr, warps_n: tl.constexpr, groups: tl.constexpr, blocks: tl.constexpr):
    """[O, M] from the sums of threads, which hold two rows of row groups and two of each eight tokens."""
    # Axes: warps along K, along rows, g, t, row group, block of tokens, h, e.
    sums_T = joined(sums, 4 * groups * blocks).reshape(warps_k, warps_n, 8, 4, groups, blocks, 2, 2)
    sums_KOM = sums_T.permute(0, 1, 4, 6, 2, 5, 3, 7).reshape(warps_k, warps_n * groups * 16, 8 * blocks)
    if warps_k == 1:
        return sums_KOM.reshape(warps_n * groups * 16, 8 * blocks)
    else:
        return tl.sum(sums_KOM, axis=0)
