"""Device functions that multiply trellis codes of table "bytes", and lattice codes, with 5 to 64 tokens in float16.

A weight is decoded once, in registers, for all tokens of a program. The four bytes of a state's product are summed by
one instruction that adds them to the pattern of a float16, 1536, whose last bit is 1: two such sums are a register of
a tensor core operand once 1536 is subtracted. A nibble n of a lattice code goes into a float16 above a bit that is one,
2 n + 1, from which 16 is subtracted: four times the coordinate n / 2 - 15/4. Values are exact in either case.

    x        float16 [MP/8, tiles, 4, 32, 8]    [.., j, 4 g + t, :]: what lane 4 g + t reads of token g of a block
    steps    float32 [M]                        a power of two for each token; x times it is the token

The eight columns [j, t, :] of a tile are those of the weights that a lane decodes one after the other,

    trellis     columns 64 (j / 2) + 16 t + 8 (j % 2) .. + 7, of rows 2 g and 2 g + 1
    lattice     columns 32 t + 8 j .. + 7, in the order 0, 4, 1, 5, 2, 6, 3, 7, of rows g and g + 8

so a load gives the operand of two products, of adjacent bytes for all lanes. In Triton's interpreter the same is
computed in plain operations.

Shapes: M tokens, O rows of W, C columns of a tile, U units of a row in it, T threads of a program, K its warps along
the columns. Sums and codes are tuples of tensors [T].
"""

import triton
import triton.language as tl

from lqer.kernels.byte_products import product_lines, registers_of_ring
from lqer.kernels.byte_sums import joined, load_groups
from lqer.kernels.lattice import LatticeLayout
from lqer.kernels.lattice_decode import index_asm, load_units, nibble_values, sign_asm, unit_places, unit_word
from lqer.kernels.tiles import TILE_K
from lqer.kernels.trellis import WEIGHTS
from lqer.kernels.trellis_decode import TILE_C, plain_values, types

# Products of a tensor core have eight tokens; a tile has four loads of eight columns for each lane.
TOKENS_AT_ONCE, LOADS = 8, 4
TOKENS_AT_ONCE_C = tl.constexpr(TOKENS_AT_ONCE)
BLOCK_HALVES = TOKENS_AT_ONCE * TILE_K  # of a tile
BLOCK_HALVES_C = tl.constexpr(BLOCK_HALVES)
LOAD_BYTES = 2 * BLOCK_HALVES // LOADS


@triton.constexpr_function
def is_lattice(layout: object) -> bool:
    return isinstance(layout, LatticeLayout)


@triton.constexpr_function
def unit_of_values(layout: object) -> float:
    """What the decoded numbers are in units of."""
    return 0.25 if is_lattice(layout) else 1.0


@triton.constexpr_function
def code_operands(layout) -> int:
    """Operands of a lane for a tile of a row group: words of trellis codes, or units of lattice codes."""
    return 2 if is_lattice(layout) else 2 * layout.bits


@triton.constexpr_function
def trellis_asm(layout, q: int, j: int, codes: list[str], made: set[int]) -> list[str]:
    """PTX: a(8 q) to a(8 q + 7) = operands of row group q for load j. `made`: see `product_lines`; emptied by ring."""
    ring, bits, lines = j // 2, layout.bits, []
    words = [*codes[ring * bits : (ring + 1) * bits], f"tail{q}"]
    if j % 2 == 0:
        made.clear()
        # The lane number of a shuffle is taken modulo 32.
        lines.append(f"shfl.sync.idx.b32 tail{q}, {words[0]}, next, 31, 0xFFFFFFFF;")
    for n in range(8):
        # Row 2 g, then 2 g + 1 of a pair of columns.
        first = 8 * (j % 2) + n // 2 * 2 + n % 2 * 16
        for i, half in ((first, "lower"), (first + 1, "upper")):
            lines += product_lines(layout, words, i, half, f"shifted{q}_", made)
            lines.append(f"dp4a.s32.s32 {half}, {half}, 0x01010101, 0x6600;")
        lines.append("prmt.b32 t, lower, upper, 0x5410;")
        # The unit is 1 / 128, and the offset 1536 / 128.
        lines.append(f"fma.rn.f16x2 a{8 * q + n}, t, unit, offset;")
    return lines


@triton.constexpr_function
def lattice_asm(q: int, j: int, units: list[str], table: str) -> list[str]:
    """The same of code j of either row."""
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
def tile_asm(layout, groups: int, blocks: int) -> str:
    """PTX: add the products of a tile of `groups` row groups and 8 `blocks` tokens to a warp's sums.

    Outputs $(4 (blocks q + i) + 2 h + e): the sum of row h of a lane's two of row group q and token 2 t + e of block i.
    Inputs: the same sums before, the codes of each row group, the address of a lane's first load and, for lattice
    codes, that of its table.
    """
    sums, lattice, count = 4 * groups * blocks, is_lattice(layout), code_operands(layout)
    x, table = f"${2 * sums + count * groups}", f"${2 * sums + count * groups + 1}"
    lines = [
        '.pragma "nounroll";',
        f".reg .b32 t, w, s, next, lower, upper, unit, offset, part, away, a<{8 * groups}>, x<{4 * blocks}>;",
    ]
    for q in range(groups):
        if lattice:
            for row in range(2):
                lines.append(".reg .b32 " + ", ".join(f"{name}{q}_{row}" for name in ("low", "b", "z", "y")) + ";")
        else:
            lines.append(f".reg .b32 tail{q}, shifted{q}_<{registers_of_ring(layout, WEIGHTS)}>;")
    lines += ["mov.u32 next, %laneid;", "add.u32 next, next, 4;"]
    # Pairs of float16: 1, -1040, 1 / 16 and -80; or 1 / 128 and -12.
    constants = (0x3C00, 0xE410, 0x2C00, 0xD500) if lattice else (0x2000, 0xCA00, 0, 0)
    for name, value in zip(("unit", "offset", "part", "away"), constants, strict=True):
        lines.append(f"mov.b32 {name}, 0x{value * 0x10001:X};")
    lines += [f"mov.b32 ${n}, ${sums + n};" for n in range(sums)]
    made: list[set[int]] = [set() for _ in range(groups)]
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    for j in range(LOADS):
        for i in range(blocks):
            loaded = ", ".join(f"x{4 * i + n}" for n in range(4))
            lines.append(
                f"ld.global.v4.b32 {{{loaded}}}, [{x}+{2 * BLOCK_HALVES * layout.tiles * i + LOAD_BYTES * j}];"
            )
        for q in range(groups):
            codes = [f"${2 * sums + count * q + n}" for n in range(count)]
            lines += lattice_asm(q, j, codes, table) if lattice else trellis_asm(layout, q, j, codes, made[q])
        for step in range(2):
            for q in range(groups):
                a = "{" + ", ".join(f"a{8 * q + 4 * step + n}" for n in range(4)) + "}"
                for i in range(blocks):
                    d = "{" + ", ".join(f"${4 * (blocks * q + i) + n}" for n in range(4)) + "}"
                    lines.append(f"{mma} {d}, {a}, {{x{4 * i + 2 * step}, x{4 * i + 2 * step + 1}}}, {d};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def tile_constraints(layout, groups: int, blocks: int) -> str:
    sums, lattice = 4 * groups * blocks, is_lattice(layout)
    codes = ["l" if lattice else "r"] * (code_operands(layout) * groups)
    return ",".join(["=&f"] * sums + ["f"] * sums + codes + ["l"] + ["r"] * lattice)


@triton.jit
def load_codes(words, group_T, lane_T, tile, last, layout: tl.constexpr, groups: tl.constexpr):
    """The codes of each thread, of a tile of `groups` row groups from group_T on; the last one instead of any after."""
    if not is_lattice(layout):
        return load_groups(words, group_T, lane_T, tile, last, layout, groups)
    elif groups == 1:
        return load_units(words, tl.minimum(group_T, last), lane_T, tile, layout.tiles, 1)
    else:
        half: tl.constexpr = groups // 2
        others = load_codes(words, group_T + half, lane_T, tile, last, layout, half)
        return load_codes(words, group_T, lane_T, tile, last, layout, half) + others


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
def add_tile(sums, codes, x, lane_T, tile, copy_T, layout: tl.constexpr, groups: tl.constexpr, blocks: tl.constexpr):
    """`sums` + the products of a tile of row groups. codes: of `load_codes`; copy_T: the lane's table, or None."""
    place_T = (x + tile * BLOCK_HALVES_C + lane_T * 8).to(tl.int64)
    arguments = sums + codes + (place_T,)
    if is_lattice(layout):
        arguments = arguments + (copy_T,)  # noqa: RUF005
    return tl.inline_asm_elementwise(
        tile_asm(layout, groups, blocks), tile_constraints(layout, groups, blocks), arguments,
        dtype=types(tl.float32, 4 * groups * blocks), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def sums_tile(
    sums, layout: tl.constexpr, warps_k: tl.constexpr, warps_n: tl.constexpr, groups: tl.constexpr, blocks: tl.constexpr
):
    """[O, M] from the sums of threads, which hold two rows of row groups and two of each eight tokens."""
    # Axes: warps along K, along rows, g, t, row group, block of tokens, h, e.
    sums_T = joined(sums, 4 * groups * blocks).reshape(warps_k, warps_n, 8, 4, groups, blocks, 2, 2)
    if is_lattice(layout):
        sums_KOM = sums_T.permute(0, 1, 4, 6, 2, 5, 3, 7)
    else:
        sums_KOM = sums_T.permute(0, 1, 4, 2, 6, 5, 3, 7)
    sums_KOM = sums_KOM.reshape(warps_k, warps_n * groups * 16, 8 * blocks)
    if warps_k == 1:
        return sums_KOM.reshape(warps_n * groups * 16, 8 * blocks)
    else:
        return tl.sum(sums_KOM, axis=0)


@triton.jit
def place_of_halves(token, columns, tiles: tl.constexpr, lattice: tl.constexpr):
    """Where columns of tokens lie among the values of x."""
    tile, inside = columns // TILE_C, columns % TILE_C
    if lattice:
        lane, load, own = inside // 32, inside // 8 % 4, inside % 4 * 2 + inside // 4 % 2
    else:
        lane, load, own = inside // 16 % 4, inside // 64 * 2 + inside // 8 % 2, inside % 8
    return ((token // 8 * tiles + tile) * 4 + load) * 256 + token % 8 * 32 + lane * 8 + own


@triton.jit
def plain_product(words, table, x, rows_O, rows_M, tile, M, layout: tl.constexpr):
    """The product [O, M] of row groups with tokens, in plain operations."""
    columns_C = tile * TILE_C + tl.arange(0, TILE_C)
    if is_lattice(layout):
        values_OC = plain_points(words, table, rows_O, tile, layout.tiles) * 4
    else:
        values_OC = plain_values(words, None, rows_O, columns_C, layout)
    tokens_M = tl.minimum(rows_M, M - 1)
    place_CM = place_of_halves(tokens_M[None, :], columns_C[:, None], layout.tiles, is_lattice(layout))
    return tl.dot(values_OC, tl.load(x + place_CM).to(tl.float32))


@triton.jit
def plain_points(units, table, rows_O, tile, tiles: tl.constexpr):
    """The lattice points of a tile [O, C], in plain operations."""
    units_OU = tl.load(unit_places(units, rows_O, tile, tiles))
    k = tl.arange(0, 8)[None, None, :]
    first = tl.join(_point(units_OU, table, 0, k), _point(units_OU, table, 2, k))
    second = tl.join(_point(units_OU, table, 1, k), _point(units_OU, table, 3, k))
    # [O, unit, coordinate, both bits of the code] to [O, unit, code, coordinate]
    both = tl.join(first, second).reshape(units_OU.shape[0], units_OU.shape[1], 8, 4)
    return both.permute(0, 1, 3, 2).reshape(units_OU.shape[0], TILE_C)


@triton.jit
def _point(units_OU, table, c: tl.constexpr, k):
    return nibble_values(unit_word(units_OU, table, c)[:, :, None], k, tl.float32)
