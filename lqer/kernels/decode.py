"""Device functions that decode packed integer codes to values, tile by tile (layout/codes.py).

A decoded tile [O, tile_k] has its columns in kernel order: code j of word w is column j * 16 + w. `permute_columns`
permutes a tile of activations accordingly.

MXINT codes u of up to four bits become bfloat16 without a conversion: 0x4300 | u is the bit pattern of 128 + u, and one
fused multiply-add (128 + u) * s - (128 + offset) * s is exact for a power of two s. Mid-rise levels need half units:
0x4280 | 2 u is 64 + u, and (64 + u) * s - (64 + offset - 1/2) * s is exact. Each instruction decodes two codes. All
other formats are decoded in float32, in plain Triton.

Shapes: M tokens, I in_features, O rows of W, T columns of a tile, W words of a row, P pairs of words, S scales of a
row. layout: a layout.RowLayout, passed as a compile-time constant.
"""

import triton
import triton.language as tl

from lqer.kernels.layout.codes import PAIRS, ROWS, WORDS
from lqer.kernels.runtime import INTERPRETED

WORDS_C = tl.constexpr(WORDS)
PAIRS_C = tl.constexpr(PAIRS)
ROWS_C = tl.constexpr(ROWS)


def pairs_asm(bits: int, mid_rise: bool) -> str:
    """PTX that decodes a pair of words of codes of 2, 3 or 4 bits to pairs of bfloat16.

    Operands: the outputs, both words, a scale per half of their codes and, for 3 bits, the high bits of the pair.
    """
    width, offset, high = 4 if bits == 4 else 2, 1 << (bits - 1), bits == 3
    # Of a bfloat16: where its integer part starts, the pattern of its power of two, and that of -(power + origin).
    unit, power = (1, 0x4280) if mid_rise else (0, 0x4300)
    bias = 0x8000 | power | ((offset << unit) - mid_rise)
    per_word = 32 // width
    halves = 2 if width == 2 else 1
    inputs = per_word
    lines = [".reg .b32 lo, hi, t, c0, c1;"]
    lines += [f"prmt.b32 lo, ${inputs}, ${inputs + 1}, 0x5410;", f"prmt.b32 hi, ${inputs}, ${inputs + 1}, 0x7632;"]
    scales = [inputs + 2 + half for half in range(halves)]
    high_word = inputs + 2 + halves
    for half, scale in enumerate(scales):
        lines += [f"mov.b32 t, 0x{bias:04X}{bias:04X};", f"mul.bf16x2 c{half}, ${scale}, t;"]
    mask = ((1 << width) - 1) << unit
    for j in range(per_word):
        source, place = ("lo", j) if j < per_word // 2 else ("hi", j - per_word // 2)
        if place * width != unit:
            lines.append(_shift(source, place * width - unit))
            source = "t"
        # (source & mask) | power
        lines.append(f"lop3.b32 ${j}, {source}, 0x{mask:04X}{mask:04X}, 0x{power:04X}{power:04X}, 0xEA;")
        if high:
            # Move bit j of each half to the place of the third bit and or it in.
            bit = 4 << unit
            shift = _shift(f"${high_word}", j - 2 - unit)
            lines += [shift, f"lop3.b32 ${j}, t, 0x{bit:04X}{bit:04X}, ${j}, 0xEA;"]
        half = j // (per_word // halves)
        lines.append(f"fma.rn.bf16x2 ${j}, ${j}, ${scales[half]}, c{half};")
    return "{\n" + "\n".join(lines) + "\n}"


def _shift(source: str, places: int) -> str:
    """t = source, shifted to the right by so many places, to the left by a negative number."""
    return f"{'shr' if places >= 0 else 'shl'}.b32 t, {source}, {abs(places)};"


def _constraints(outputs: int, inputs: int) -> str:
    return ",".join(["=r"] * outputs + ["r"] * inputs)


# By levels, mid-tread and mid-rise.
ASM_4, RISE_4 = (tl.constexpr(pairs_asm(4, mid_rise)) for mid_rise in (False, True))
ASM_2, RISE_2 = (tl.constexpr(pairs_asm(2, mid_rise)) for mid_rise in (False, True))
ASM_3, RISE_3 = (tl.constexpr(pairs_asm(3, mid_rise)) for mid_rise in (False, True))
# With pack=2 every operand is passed twice, except that two 16-bit scales share a register.
CONSTRAINTS_4 = tl.constexpr(_constraints(8, 3))
CONSTRAINTS_2 = tl.constexpr(_constraints(16, 4))
CONSTRAINTS_3 = tl.constexpr(_constraints(16, 6))
BF16_8 = tl.constexpr((tl.bfloat16,) * 8)
BF16_16 = tl.constexpr((tl.bfloat16,) * 16)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32. Triton's interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def rows_of_x(rows_M, M, order, fan: tl.constexpr):
    """The row of x of each token: its own or, where `order` is given, that of one of `fan` pairs of a token each."""
    if order is None:
        return rows_M
    else:
        return tl.load(order + rows_M, mask=rows_M < M, other=0) // fan


@triton.jit
def load_words(words, rows_O, tile, tiles: tl.constexpr):
    """int32 [O, 16]: the words of each row in tile `tile`."""
    base_O = (rows_O // ROWS_C) * (tiles * ROWS_C * WORDS_C) + (rows_O % ROWS_C) * WORDS_C
    return tl.load(words + base_O[:, None] + (tl.arange(0, WORDS_C) + tile * (ROWS_C * WORDS_C))[None, :])


@triton.jit
def load_high(high, rows_O, tile, tiles: tl.constexpr):
    """int32 [O, 8]: the high bits of three-bit codes, one word per pair."""
    base_O = (rows_O // ROWS_C) * (tiles * ROWS_C * PAIRS_C) + (rows_O % ROWS_C) * PAIRS_C
    return tl.load(high + base_O[:, None] + (tl.arange(0, PAIRS_C) + tile * (ROWS_C * PAIRS_C))[None, :])


@triton.jit
def load_scales(scales, rows_O, unit, layout: tl.constexpr):
    """[O, per_tile]: the scales (or zeros) of each row in unit `unit`, a tile or all tiles of a longer block."""
    per_tile: tl.constexpr = layout.scales_per_tile
    base_O = (rows_O // ROWS_C) * (layout.units * ROWS_C * per_tile) + (rows_O % ROWS_C) * per_tile
    return tl.load(scales + base_O[:, None] + (tl.arange(0, per_tile) + unit * (ROWS_C * per_tile))[None, :])


@triton.jit
def _spread(scales_OS, halves: tl.constexpr):
    """[O, per_tile] to [O, halves, 8]: one scale for each pair of words and each half of its codes."""
    rows: tl.constexpr = scales_OS.shape[0]
    per_half: tl.constexpr = scales_OS.shape[1] // halves
    wide = scales_OS.reshape(rows, halves, per_half, 1).broadcast_to(rows, halves, per_half, PAIRS_C // per_half)
    return wide.reshape(rows, halves, PAIRS_C)


@triton.jit
def _per_word(pairs_OP):
    """[O, 8], an element per pair, to [O, 16], an element per word."""
    rows: tl.constexpr = pairs_OP.shape[0]
    return pairs_OP[:, :, None].broadcast_to(rows, PAIRS_C, 2).reshape(rows, WORDS_C)


@triton.jit
def exponent_to_scale(exponents, dtype: tl.constexpr):
    """Biased exponents (uint8) to powers of two; exponent 0 to 0."""
    return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _join4(v0, v1, v2, v3):
    return tl.join(tl.join(v0, v2), tl.join(v1, v3))


@triton.jit
def _code_major(values_OW222):
    """[O, 16 words, 2, 2, ..] with the bits of the code number last, to [O, tile_k], code-major."""
    rows: tl.constexpr = values_OW222.shape[0]
    if len(values_OW222.shape) == 5:
        ordered = values_OW222.permute(0, 2, 3, 4, 1)
        return ordered.reshape(rows, 8 * WORDS_C)
    else:
        ordered = values_OW222.permute(0, 2, 3, 4, 5, 1)
        return ordered.reshape(rows, 16 * WORDS_C)


@triton.jit
def decode_pairs(words_OW, high_OP, exponents_OS, layout: tl.constexpr):
    """MXINT codes of 2, 3 or 4 bits to bfloat16 [O, tile_k], two per instruction."""
    rows: tl.constexpr = words_OW.shape[0]
    scales = _spread(exponent_to_scale(exponents_OS, tl.bfloat16), layout.halves)
    if layout.bits == 4:
        scale_OW = _per_word(scales.reshape(rows, PAIRS_C))
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            RISE_4 if layout.mid_rise else ASM_4,
            CONSTRAINTS_4,
            [words_OW, scale_OW],
            dtype=BF16_8,
            is_pure=True,
            pack=2,
        )
        return _code_major(tl.join(_join4(v0, v2, v4, v6), _join4(v1, v3, v5, v7)))
    else:
        if layout.halves == 2:
            first_OP, second_OP = tl.split(scales.permute(0, 2, 1))
        else:
            first_OP = scales.reshape(rows, PAIRS_C)
            second_OP = first_OP
        scale0_OW, scale1_OW = _per_word(first_OP), _per_word(second_OP)
        if layout.bits == 3:
            v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15 = tl.inline_asm_elementwise(
                RISE_3 if layout.mid_rise else ASM_3,
                CONSTRAINTS_3,
                [words_OW, scale0_OW, scale1_OW, _per_word(high_OP)],
                dtype=BF16_16,
                is_pure=True,
                pack=2,
            )
        else:
            v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15 = tl.inline_asm_elementwise(
                RISE_2 if layout.mid_rise else ASM_2,
                CONSTRAINTS_2,
                [words_OW, scale0_OW, scale1_OW],
                dtype=BF16_16,
                is_pure=True,
                pack=2,
            )
        even = tl.join(_join4(v0, v4, v8, v12), _join4(v2, v6, v10, v14))
        odd = tl.join(_join4(v1, v5, v9, v13), _join4(v3, v7, v11, v15))
        return _code_major(tl.join(even, odd))


@triton.jit
def decode_any(
    words_OW,
    high_OP,
    scales_OS,
    zeros_OS,
    layout: tl.constexpr,
    dtype: tl.constexpr,
):
    """(code - offset - zero) * scale of any format, computed in float32, in `dtype` [O, tile_k]."""
    rows: tl.constexpr = words_OW.shape[0]
    halves: tl.constexpr = layout.halves
    width: tl.constexpr = layout.width
    per_half: tl.constexpr = layout.per_word // halves
    # [O, half, code of the half, pair, odd], the order of the result
    words = words_OW.reshape(rows, 1, 1, PAIRS_C, 2)
    code = tl.arange(0, halves)[:, None] * per_half + tl.arange(0, per_half)[None, :]
    code = code.reshape(1, halves, per_half, 1, 1)
    codes = (words >> (code * width)) & ((1 << width) - 1)
    if layout.bits == 3:
        place = tl.arange(0, 2).reshape(1, 1, 1, 1, 2) * 16 + code
        codes |= ((high_OP.reshape(rows, 1, 1, PAIRS_C, 1) >> place) & 1) << 2
    shifted = codes.to(tl.float32) - layout.origin
    if layout.exponents:
        scales = exponent_to_scale(scales_OS, tl.float32)
    else:
        scales = scales_OS.to(tl.float32)
        if zeros_OS is not None:
            zeros = _spread(zeros_OS.to(tl.float32), halves)
            shifted -= zeros.reshape(rows, halves, 1, PAIRS_C, 1)
    values = shifted * _spread(scales, halves).reshape(rows, halves, 1, PAIRS_C, 1)
    return values.to(dtype).reshape(rows, layout.tile_k)


@triton.constexpr_function
def decodes_pairs(layout, dtype):
    """Whether `decode_pairs` supports this layout: MXINT codes of at most four bits to bfloat16, on a GPU."""
    return layout.exponents and layout.bits <= 4 and dtype == tl.bfloat16 and not INTERPRETED


@triton.jit
def decode_tile(
    words,
    high,
    scales,
    zeros,
    rows_O,
    tile,
    layout: tl.constexpr,
    dtype: tl.constexpr,
):
    """Tile `tile` of rows_O, decoded to `dtype` [O, tile_k] in kernel order."""
    words_OW = load_words(words, rows_O, tile, layout.tiles)
    scales_OS = load_scales(scales, rows_O, tile // layout.tiles_per_unit, layout)
    if layout.bits == 3:
        high_OP = load_high(high, rows_O, tile, layout.tiles)
    else:
        high_OP = None
    if decodes_pairs(layout, dtype):
        return decode_pairs(words_OW, high_OP, scales_OS, layout)
    else:
        if zeros is not None:
            zeros_OS = load_scales(zeros, rows_O, tile // layout.tiles_per_unit, layout)
        else:
            zeros_OS = None
        return decode_any(words_OW, high_OP, scales_OS, zeros_OS, layout, dtype)


@triton.jit
def permute_columns(x_MI, tile_k: tl.constexpr):
    """Whole tiles of activations from natural order to kernel order."""
    rows: tl.constexpr = x_MI.shape[0]
    columns: tl.constexpr = x_MI.shape[1]
    # [M, tile, pair, code, odd] to [M, tile, code, pair, odd]
    tiles = x_MI.reshape(rows, columns // tile_k, PAIRS_C, tile_k // WORDS_C, 2)
    return tiles.permute(0, 1, 3, 2, 4).reshape(rows, columns)


@triton.jit
def restore_columns(w_OT):
    """The inverse of `permute_columns`."""
    rows: tl.constexpr = w_OT.shape[0]
    tile_k: tl.constexpr = w_OT.shape[1]
    return w_OT.reshape(rows, tile_k // WORDS_C, PAIRS_C, 2).permute(0, 2, 1, 3).reshape(rows, tile_k)
