"""PTX that multiplies trellis codes of table "bytes" with tokens held in registers (resident.py).

Up to four tokens are integers 256 h + l, and weights the bytes of an operand of integer tensor cores (byte_sums.py). Of
more, weights are decoded to float16 once for all tokens (halves.py). The four bytes of a state's product are then
summed by an integer tensor core too: a product with a matrix of zeros and ones gives each lane the sums of the four
registers that it had put in, added to the pattern of a float16, 1536. Two such patterns are a register of the other
operand. 1536 is not subtracted from them: sums start at -1536 times those of the tokens.
"""

from __future__ import annotations

import triton

from lqer.kernels.halves import BLOCK_HALVES, LOAD_BYTES, LOADS, MULTIPLY_HALVES
from lqer.kernels.layout.trellis import WEIGHTS, TrellisLayout
from lqer.kernels.trellis.byte_products import product_lines, registers_of_ring

SPREAD = 32  # registers of a tile's tokens of four bytes each
HALVES = 16  # of eight tokens in float16
MULTIPLY_BYTES = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"


@triton.constexpr_function
def spread_asm() -> str:
    """PTX: $(16 h + c) = byte c of the four words of ring h, four times; of eight words and a step, which is $32."""
    first = SPREAD + 1
    lines = [f"prmt.b32 ${c}, ${first + c // 4}, ${first + c // 4}, {0x1111 * (c % 4)};" for c in range(SPREAD)]
    return "\n".join([*lines, f"mov.b32 ${SPREAD}, ${first + 8};"])


@triton.constexpr_function
def bytes_asm(layout, tiles: int) -> str:
    """PTX: the products of a row group and four tokens over the tiles of a warp.

    Outputs $0 and $1: the sums of rows 2 g and 2 g + 1 and token t, in lane 4 g + t. Inputs: the 2 k words of a lane
    for each tile, then the outputs of `spread_asm` for each.
    """
    bits, count = layout.bits, registers_of_ring(layout, WEIGHTS)
    lines = [
        '.pragma "nounroll";', f".reg .b32 t, next, tail, a<4>, d<4>, codes<{count}>;", ".reg .f32 sum;",
        "mov.u32 next, %laneid;", "add.u32 next, next, 4;", "mov.b32 $0, 0;", "mov.b32 $1, 0;",
    ]  # fmt: skip
    for i in range(tiles):
        tokens = 2 + 2 * bits * tiles + (SPREAD + 1) * i
        lines += [f"mov.b32 d{n}, 0;" for n in range(4)]
        for ring in range(2):
            words = [f"${2 + (2 * i + ring) * bits + n}" for n in range(bits)]
            # The lane number of a shuffle is taken modulo 32.
            lines.append(f"shfl.sync.idx.b32 tail, {words[0]}, next, 31, 0xFFFFFFFF;")
            made: set[int] = set()
            for column in range(0, 16, 2):
                # Rows 2 g and 2 g + 1 of this column, then of the next.
                for n, weight in enumerate((column, column + 16, column + 1, column + 17)):
                    lines += product_lines(layout, [*words, "tail"], weight, f"a{n}", "codes", made)
                x = tokens + 16 * ring + column
                lines.append(
                    f"{MULTIPLY_BYTES} {{d0, d1, d2, d3}}, {{a0, a1, a2, a3}}, {{${x}, ${x + 1}}}, {{d0, d1, d2, d3}};"
                )
        for n in range(2):
            lines += [
                f"mad.lo.s32 d{2 * n}, d{2 * n}, 256, d{2 * n + 1};", f"cvt.rn.f32.s32 sum, d{2 * n};",
                f"fma.rn.f32 ${n}, sum, ${tokens + SPREAD}, ${n};",
            ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def bytes_constraints(layout, tiles: int) -> str:
    tokens = (["r"] * SPREAD + ["f"]) * tiles
    return ",".join(["=&f"] * 2 + ["r"] * 2 * layout.bits * tiles + tokens)


@triton.constexpr_function
def halves_asm(layout: TrellisLayout, tiles: int, blocks: int) -> str:
    """PTX: the products of a row group and 8 `blocks` tokens over the tiles of a warp.

    Outputs $(4 i + 2 h + e): the sum of row 2 g + h and token 2 t + e of block i, in lane 4 g + t. Inputs: the 2 k
    words of a lane for each tile, its tokens as `tokens_asm` loads them, the two registers that choose sums of bytes,
    and the sums to begin with, of two tokens for each block.
    """
    sums, count = 4 * blocks, 2 * layout.bits
    first_x = sums + count * tiles
    last = first_x + HALVES * blocks * tiles
    lines = [
        '.pragma "nounroll";', ".reg .b32 t, next, tail, a<8>, p<4>, d<4>, c<4>;",
        f".reg .b32 codes<{registers_of_ring(layout, WEIGHTS)}>;", "mov.u32 next, %laneid;", "add.u32 next, next, 4;",
    ]  # fmt: skip
    lines += [f"mov.b32 c{n}, 0x6600;" for n in range(4)]
    lines += [f"mov.b32 ${n}, ${last + 2 + n // 4 * 2 + n % 2};" for n in range(sums)]
    made: set[int] = set()
    for i in range(tiles):
        codes = [f"${sums + count * i + n}" for n in range(count)]
        for j in range(LOADS):
            lines += decode_lines(layout, j, codes, f"${last}", f"${last + 1}", made)
            for step in range(2):
                a = "{" + ", ".join(f"a{4 * step + n}" for n in range(4)) + "}"
                for b in range(blocks):
                    d = "{" + ", ".join(f"${4 * b + n}" for n in range(4)) + "}"
                    x = first_x + HALVES * (blocks * i + b) + 4 * j + 2 * step
                    lines.append(f"{MULTIPLY_HALVES} {d}, {a}, {{${x}, ${x + 1}}}, {d};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def decode_lines(layout: TrellisLayout, j: int, codes: list[str], even: str, odd: str, made: set[int]) -> list[str]:
    """PTX: a0 to a7 = 1536 + the sums of bytes of load j. `made`: see `product_lines`; emptied by ring."""
    ring, bits, lines = j // 2, layout.bits, []
    words = [*codes[ring * bits : (ring + 1) * bits], "tail"]
    if j % 2 == 0:
        made.clear()
        # The lane number of a shuffle is taken modulo 32.
        lines.append(f"shfl.sync.idx.b32 tail, {words[0]}, next, 31, 0xFFFFFFFF;")
    for pair in range(4):
        first = 8 * (j % 2) + 2 * pair
        # Rows 2 g and 2 g + 1 of a column, then of the next.
        for n, weight in enumerate((first, first + 16, first + 1, first + 17)):
            lines += product_lines(layout, words, weight, f"p{n}", "codes", made)
        lines += [
            f"{MULTIPLY_BYTES} {{d0, d1, d2, d3}}, {{p0, p1, p2, p3}}, {{{even}, {odd}}}, {{c0, c1, c2, c3}};",
            f"prmt.b32 a{2 * pair}, d0, d1, 0x5410;",
            f"prmt.b32 a{2 * pair + 1}, d2, d3, 0x5410;",
        ]
    return lines


@triton.constexpr_function
def halves_constraints(layout: TrellisLayout, tiles: int, blocks: int) -> str:
    inputs = ["r"] * (2 * layout.bits * tiles + HALVES * blocks * tiles + 2)
    return ",".join(["=&f"] * 4 * blocks + inputs + ["f"] * 2 * blocks)


@triton.constexpr_function
def tokens_asm(layout, blocks: int) -> str:
    """PTX: a lane's registers of a tile of tokens, block after block, from the address of the first; else zeros."""
    count = HALVES * blocks
    lines = [".reg .pred present;", f"setp.ne.s32 present, ${count + 1}, 0;"]
    for first in range(0, count, 4):
        outputs = ", ".join(f"${first + n}" for n in range(4))
        place = f"${count}+{2 * BLOCK_HALVES * layout.tiles * (first // HALVES) + LOAD_BYTES * (first % HALVES // 4)}"
        lines += [f"mov.b32 ${first + n}, 0;" for n in range(4)]
        lines.append(f"@present ld.global.v4.b32 {{{outputs}}}, [{place}];")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def start_asm(tiles: int, blocks: int) -> str:
    """PTX: $(2 i + e) = -1536 times the sum of token 2 t + e of block i over the tiles of a warp."""
    lines = [".reg .b32 ones<4>;", f".reg .f32 d<{4 * blocks}>;"]
    lines += [f"mov.b32 ones{n}, 0xE600E600;" for n in range(4)] + [f"mov.b32 d{n}, 0;" for n in range(4 * blocks)]
    for i in range(tiles):
        for b in range(blocks):
            d = "{" + ", ".join(f"d{4 * b + n}" for n in range(4)) + "}"
            for step in range(0, HALVES, 2):
                x = 2 * blocks + HALVES * (blocks * i + b) + step
                lines.append(f"{MULTIPLY_HALVES} {d}, {{ones0, ones1, ones2, ones3}}, {{${x}, ${x + 1}}}, {d};")
    lines += [f"mov.b32 ${n}, d{n // 2 * 4 + n % 2};" for n in range(2 * blocks)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def start_constraints(tiles: int, blocks: int) -> str:
    return ",".join(["=&f"] * 2 * blocks + ["r"] * HALVES * blocks * tiles)


@triton.constexpr_function
def leave_asm(count: int) -> str:
    """PTX: store a thread's sums at the address $(1 + count): two if $(2 + count), or more, four by four."""
    place, lines = f"${1 + count}", ["mov.b32 $0, 0;"]
    if count == 2:
        lines += [".reg .pred stored;", "setp.ne.s32 stored, $4, 0;"]
        lines.append(f"@stored st.shared.v2.f32 [{place}], {{$1, $2}};")
    for first in range(0, count - 2, 4):
        sums = ", ".join(f"${1 + first + n}" for n in range(4))
        lines.append(f"st.shared.v4.f32 [{place}+{first * 128}], {{{sums}}};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def add_asm(warps: int, stride: int) -> str:
    """PTX: $0 = the sum of `warps` numbers in shared memory, `stride` bytes apart, from the address $1 on."""
    lines = [f".reg .f32 v<{warps}>;"]
    lines += [f"ld.shared.f32 v{n}, [$1+{stride * n}];" for n in range(warps)]
    width = warps
    while width > 1:
        width //= 2
        lines += [f"add.f32 v{n}, v{n}, v{n + width};" for n in range(width)]
    return "{\n" + "\n".join([*lines, "mov.f32 $0, v0;"]) + "\n}"


@triton.constexpr_function
def leave_constraints(count: int) -> str:
    return ",".join(["=r"] + ["f"] * count + ["r"])


@triton.constexpr_function
def reserve_asm(name: str, size: int) -> str:
    """PTX: $0 = the address of `size` bytes of shared memory."""
    return f"{{\n.shared .align 16 .b8 {name}[{size}];\nmov.u32 $0, {name};\n}}"
