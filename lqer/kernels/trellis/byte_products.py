"""PTX that computes, for trellis codes of table "bytes", the product a state mod 2^32 of every window of a lane.

A state has to be cut out of the codes and brought to bit 0 before one integer multiplication gives four bytes whose sum
is the value (lqer.formats.trellis). Integer shifts and masks share a pipe of a multiprocessor, and left shifts and
multiplications another, each with 16 lanes a cycle. So a window that begins at bit b > 0 of a register is moved by a
floating-point addition instead, which has pipes of its own:

    t = register & (2^L - 1) 2^b | 0x4B000000       as a float32: 2^23 + state 2^b, exact for b + L ≤ 23
    t = t + 2^(23 + b)                              whose last bit is 2^b: its pattern is a constant + state
    a t - a constant                                = a state, modulo 2^32

Neighbouring windows share the register, a shift of the codes. A window that begins it needs no addition, and one that
ends a word of the codes is a single shift.
"""

from __future__ import annotations

import triton

from lqer.kernels.layout.trellis import TrellisLayout

WORD = (1 << 32) - 1
MANTISSA = 23
BIAS = 127
UNIT = 0x4B000000  # the pattern of 2^23, whose last bit is 1


@triton.constexpr_function
def windows_of_register(layout: TrellisLayout) -> int:
    """Windows that lie in the low 23 bits of a register."""
    return (MANTISSA - layout.state_bits) // layout.bits + 1


@triton.constexpr_function
def registers_of_ring(layout: TrellisLayout, weights: int) -> int:
    """Registers of shifted codes that so many windows need."""
    return -(-weights // windows_of_register(layout))


@triton.constexpr_function
def product_lines(
    layout: TrellisLayout, words: list[str], i: int, target: str, shifted: str, made: set[int]
) -> list[str]:
    """PTX: target = a state_i.

    words: k + 1 registers of codes. shifted: prefix of numbered registers; `made` has the numbers of those that earlier
    lines have filled, and gets that of this one. t is overwritten.
    """
    bits, width = layout.bits, layout.state_bits
    word, bit = divmod(i * bits, 32)
    product = [f"mul.lo.u32 {target}, t, {layout.multiplier};"]
    if bit + width == 32:
        return [f"shr.u32 t, {words[word]}, {bit};", *product]
    number, place = divmod(i, windows_of_register(layout))
    register, lines = f"{shifted}{number}", []
    if number not in made:
        made.add(number)
        word, bit = divmod(number * windows_of_register(layout) * bits, 32)
        # Beyond the last word no window of this register reaches.
        above = words[min(word + 1, len(words) - 1)]
        lines.append(
            f"shf.r.clamp.b32 {register}, {words[word]}, {above}, {bit};"
            if bit
            else f"mov.b32 {register}, {words[word]};"
        )
    mask, up = (1 << width) - 1, place * bits
    if not up:
        return [*lines, f"and.b32 t, {register}, {mask};", *product]
    constant = (BIAS + MANTISSA + up << MANTISSA) + (1 << MANTISSA - up)
    return [
        *lines,
        f"lop3.b32 t, {register}, 0x{mask << up:X}, 0x{UNIT:X}, 0xEA;",
        f"add.rn.f32 t, t, 0f{BIAS + MANTISSA + up << MANTISSA:08X};",
        f"mad.lo.u32 {target}, t, {layout.multiplier}, {-layout.multiplier * constant & WORD};",
    ]
