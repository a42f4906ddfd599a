"""PTX of Hadamard rotations: sums of a token's blocks of 128 or 256 values, and H of each sum by butterflies.

A program of W warps computes 128 W values of (O ⊗ H_B) x, blocks of B. Warp w adds the blocks w, w + W, .. of x, each
times its element of the program's rows of O, for all of these at once; lane l has columns 4 l to 4 l + 3 of every 128.
The sums of all warps meet in shared memory. Then each warp has 128 values of its own: it adds what the warps left, for
B = 256 both halves of the block as the last step of H_256 wants them, and takes the other seven steps of H_128 in
registers, five of them by exchanging values between lanes. Where x is to be normed, warps also leave the sums of the
squares of what they have read.

Letters: W warps, P blocks of a program, h halves of 128 of a block: W = P h.
"""

from __future__ import annotations

import triton

STEPS = 5  # of H_128 between lanes
MINUS_LOG2_E = "0fBFB8AA3B"
SQUARES = 512  # bytes from the warps' largest magnitudes to the sums of their squares


@triton.constexpr_function
def load_asm(halves: int, element: str, splits: int) -> str:
    """PTX: a lane's values of a block, of 128 columns and of the next; the sums of `splits` places if in float32.

    element: "f32", four registers of each 128 columns; "bf16" or "f16", two.
    """
    width = 4 if element == "f32" else 2
    count = width * halves
    lines = [f".reg .f32 v<{count}>;"] if splits > 1 else []
    for split in range(splits):
        for first in range(0, count, width):
            names = [f"v{first + n}" if split else f"${first + n}" for n in range(width)]
            offset = first // width * (512 if element == "f32" else 256)
            lines.append(f"ld.global.v{width}.b32 {{{', '.join(names)}}}, [${count + split}+{offset}];")
        if split:
            lines += [f"add.f32 ${n}, ${n}, v{n};" for n in range(count)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def rows_asm(blocks: int) -> str:
    """PTX: elements of the program's rows of O for one block of x, float32, from their address."""
    width = min(blocks, 4)
    lines = []
    for first in range(0, blocks, width):
        names = ", ".join(f"${first + n}" for n in range(width))
        names, vector = (f"{{{names}}}", f".v{width}") if width > 1 else (names, "")
        lines.append(f"ld.global{vector}.b32 {names}, [${blocks}+{4 * first}];")
    return "\n".join(lines)


@triton.constexpr_function
def weighted_asm(halves: int, element: str) -> str:
    """PTX: x ⊙ signs ⊙ (offset + w) of a lane in float32, from the outputs of `load_asm` of the three, and offset."""
    return _of_three(halves, element, [f"add.f32 c, c, ${10 * halves};", "mul.f32 b, b, c;", "mul.f32 a, a, b;"])


@triton.constexpr_function
def gated_asm(halves: int, element: str) -> str:
    """PTX: silu(x) ⊙ signs ⊙ up of a lane in float32, from the outputs of `load_asm` of the three."""
    steps = [
        "mul.f32 b, b, c;", "mul.f32 b, b, a;", f"mul.f32 a, a, {MINUS_LOG2_E};", "ex2.approx.ftz.f32 a, a;",
        "add.f32 a, a, 0f3F800000;", "rcp.approx.ftz.f32 a, a;", "mul.f32 a, a, b;",
    ]  # fmt: skip
    return _of_three(halves, element, steps)


@triton.constexpr_function
def _of_three(halves: int, element: str, steps: list[str]) -> str:
    """PTX: steps that leave in a what they make of elements a, b and c of three vectors."""
    pairs = 2 * halves
    lines = [".reg .b16 low<3>, high<3>;", ".reg .f32 a, b, c;"]
    for n in range(pairs):
        lines += [f"mov.b32 {{low{i}, high{i}}}, ${(2 + i) * pairs + n};" for i in range(3)]
        for place, half in ((2 * n, "low"), (2 * n + 1, "high")):
            lines += [f"cvt.f32.{element} {name}, {half}{i};" for i, name in enumerate("abc")]
            lines += [*steps, f"mov.b32 ${place}, a;"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def squares_asm(halves: int, element: str) -> str:
    """PTX: $0 = the sum before, and the squares of a block's values times `present`.

    Inputs: the sum before, the outputs of `load_asm`, and `present`: 0 where the block is one that was read before.
    """
    pairs = 2 * halves
    lines = [".reg .f32 x, own;", ".reg .b16 low, high;", "mov.f32 own, 0f00000000;"]
    for n in range(pairs):
        lines.append(f"mov.b32 {{low, high}}, ${2 + n};")
        for half in ("low", "high"):
            lines += [f"cvt.f32.{element} x, {half};", "fma.rn.f32 own, x, x, own;"]
    lines.append(f"fma.rn.f32 $0, own, ${2 + pairs}, $1;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def sum_asm(blocks: int, halves: int, element: str, largest: bool) -> str:
    """PTX: add a block of x, times each row of O, to the sums of a lane, and keep the largest magnitude of x.

    Outputs: the sums of column 128 c + 4 l + e for row p at 4 (h p + c) + e, and the `largest`. Inputs: these before,
    the outputs of `load_asm` of x and, if it is not float32, of signs, and those of `rows_asm`.
    """
    sums, columns = 4 * halves * blocks, 4 * halves
    inputs = element != "f32"
    outputs = sums + largest
    first_x = 2 * outputs
    lines = [f".reg .f32 x<{columns}>, size;", ".reg .b32 pair;", ".reg .b16 low, high;"]
    lines += [f"mov.b32 ${n}, ${outputs + n};" for n in range(outputs)]
    if inputs:
        first_sign = first_x + columns // 2
        first_row = first_sign + columns // 2
        for n in range(columns // 2):
            lines += [
                f"mul.{element}x2 pair, ${first_x + n}, ${first_sign + n};", "mov.b32 {low, high}, pair;",
                f"cvt.f32.{element} x{2 * n}, low;", f"cvt.f32.{element} x{2 * n + 1}, high;",
            ]  # fmt: skip
    else:
        first_row = first_x + columns
        lines += [f"mov.b32 x{n}, ${first_x + n};" for n in range(columns)]
    if largest:
        for n in range(columns):
            lines += [f"abs.f32 size, x{n};", f"max.NaN.f32 ${sums}, ${sums}, size;"]
    for p in range(blocks):
        for n in range(columns):
            at = columns * p + n
            lines.append(f"fma.rn.f32 ${at}, x{n}, ${first_row + p}, ${at};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def leave_asm(count: int, largest: bool, squares: bool) -> str:
    """PTX: leave the sums of a lane at $(1 + count), 512 bytes apart, and what the warp has for its token.

    Its `largest`, an input after the address $(2 + count) where it is left, and the sum of its `squares`, the last
    input, further on.
    """
    lines = [".reg .b32 most;", ".reg .f32 sum, other;", "mov.u32 $0, 0;"]
    for first in range(0, count, 4):
        names = ", ".join(f"${1 + first + n}" for n in range(4))
        lines.append(f"st.shared.v4.b32 [${1 + count}+{128 * first}], {{{names}}};")
    if largest:
        # Magnitudes, and NaN above them, are in the order of their patterns.
        lines += [f"redux.sync.max.u32 most, ${3 + count}, 0xFFFFFFFF;", f"st.shared.b32 [${2 + count}], most;"]
    if squares:
        lines.append(f"mov.f32 sum, ${3 + count + largest};")
        for step in range(STEPS):
            lines += [f"shfl.sync.bfly.b32 other, sum, {1 << step}, 31, 0xFFFFFFFF;", "add.f32 sum, sum, other;"]
        lines.append(f"st.shared.b32 [${2 + count}+{SQUARES}], sum;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def finish_asm(warps: int, halves: int, largest: str, squares: bool) -> str:
    """PTX: $0 to $3 = a lane's four of the 128 values of its warp.

    largest: "token", $4 = the largest magnitude of the token; "tile", that of the 128 values; "", nothing. squares: the
    last output is the sum of the token's.
    Inputs: the address of what lane l of the first warp left for the first half of this warp's block, 1 or -1 by which
    the second half is multiplied, and the address of the first warp's largest.
    """
    outputs = 4 + (largest != "") + squares
    place, sign, most = f"${outputs}", f"${outputs + 1}", f"${outputs + 2}"
    lines = [f".reg .f32 v<{4 * halves}>, x<4>, y, own;", ".reg .b32 lane, bit, other, t<4>;"]
    for c in range(halves):
        for w in range(warps):
            lines.append(f"ld.shared.v4.b32 {{t0, t1, t2, t3}}, [{place}+{512 * (c + warps * w)}];")
            for n in range(4):
                v = f"v{4 * c + n}"
                lines.append(f"add.f32 {v}, {v}, t{n};" if w else f"mov.b32 {v}, t{n};")
    for n in range(4):
        lines.append(f"fma.rn.f32 x{n}, v{4 + n}, {sign}, v{n};" if halves == 2 else f"mov.f32 x{n}, v{n};")
    for low, high in ((0, 1), (2, 3), (0, 2), (1, 3)):
        lines += [f"sub.f32 y, x{low}, x{high};", f"add.f32 x{low}, x{low}, x{high};", f"mov.f32 x{high}, y;"]
    lines.append("mov.u32 lane, %laneid;")
    for step in range(STEPS):
        # The upper of two lanes subtracts its own value: -1.0 instead of 1.0.
        lines += [
            f"and.b32 bit, lane, {1 << step};", f"shl.b32 bit, bit, {31 - step};", "or.b32 own, bit, 0x3F800000;",
        ]  # fmt: skip
        for n in range(4):
            lines.append(f"shfl.sync.bfly.b32 other, x{n}, {1 << step}, 31, 0xFFFFFFFF;")
            lines.append(f"fma.rn.f32 x{n}, x{n}, own, other;")
    lines += [f"mov.f32 ${n}, x{n};" for n in range(4)]
    if largest == "tile":
        lines.append("abs.f32 own, x0;")
        for n in range(1, 4):
            lines += [f"abs.f32 y, x{n};", "max.NaN.f32 own, own, y;"]
        # As in `leave_asm`.
        lines += ["mov.b32 other, own;", "redux.sync.max.u32 other, other, 0xFFFFFFFF;", "mov.b32 $4, other;"]
    if largest == "token":
        lines.append(f"ld.shared.b32 $4, [{most}];")
        for w in range(1, warps):
            lines += [f"ld.shared.b32 other, [{most}+{4 * w}];", "max.NaN.f32 $4, $4, other;"]
    if squares:
        lines.append(f"ld.shared.b32 ${outputs - 1}, [{most}+{SQUARES}];")
        for w in range(1, warps):
            lines += [
                f"ld.shared.b32 other, [{most}+{SQUARES + 4 * w}];",
                f"add.f32 ${outputs - 1}, ${outputs - 1}, other;",
            ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
