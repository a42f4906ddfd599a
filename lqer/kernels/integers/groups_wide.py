"""Device functions that multiply four-bit integer groups (layout/groups.py) with 17 tokens and more.

Half a strip, 128 columns, is decoded to the dtype of the tokens in registers, as the operand of wgmma that comes from
there; tokens are shared by all rows of a program, in shared memory. A product (u - z) s is rounded once, as in
emulation. A float16 scale is no bfloat16, so it is the sum of two: (u - z) s_low is rounded, and (u - z) s_high + that
once more, which differs from rounding once only next to ties.

Triton keeps what is decoded where it is only if it comes from loads by operations that move no data between threads: so
scales and zero points are loaded as whole words, which also lets Triton copy them ahead.

Decoded columns are in the order of the tensor core's operand: column 8 t + 2 p + e of a step of 32, which lane t holds
in field p of a word, is its column 8 p + 2 t + e. `order_steps` brings tokens into that order.

Shapes: M tokens, O rows of W, G row groups of 16, W words of a row in half a strip, P groups of it, C
columns of it, F words of zero points, H rows g and g + 8 of a row group.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from lqer.kernels.decode import ROWS_C, dot, rows_of_x
from lqer.kernels.layout.groups import STRIP, GroupLayout
from lqer.kernels.runtime import INTERPRETED

BITS = 4
COLUMNS = STRIP // 2
WORDS = COLUMNS * BITS // 32  # of a row in half a strip
WORDS_C, COLUMNS_C = tl.constexpr(WORDS), tl.constexpr(COLUMNS)
# Two numbers whose last mantissa bits take a code: by whether they are bfloat16, else float16.
NUMBERS = {False: 0x64006400, True: 0x43004300}


@triton.constexpr_function
def is_exact(layout: GroupLayout, bfloat: bool) -> bool:
    """Whether scales are numbers of the tokens' dtype."""
    return layout.bfloat == bfloat


@triton.constexpr_function
def groups_of_half(layout: GroupLayout) -> int:
    return max(1, layout.groups // 2)


@triton.constexpr_function
def spread_asm(layout: GroupLayout, bfloat: bool) -> str:
    """PTX: $0, $1, $2 = in both halves 2^n + zero, scale and its low part; of a scale's bits $3 and a zero point $4."""
    dtype = "bf16" if bfloat else "f16"
    lines = [".reg .b16 h, none; .reg .f32 f, g;", "mov.b32 {h, none}, $3;", "mul.lo.u32 $0, $4, 0x10001;"]
    lines.append(f"or.b32 $0, $0, 0x{NUMBERS[bfloat]:08X};")
    if is_exact(layout, bfloat):
        return "{\n" + "\n".join([*lines, "mov.b32 $1, {h, h};", "mov.b32 $2, 0;"]) + "\n}"
    lines += ["shl.b32 $2, $3, 16;", "mov.b32 f, $2;"] if layout.bfloat else ["cvt.f32.f16 f, h;"]
    lines += [f"cvt.rn.{dtype}.f32 h, f;", "mov.b32 $1, {h, h};"]
    lines += ["and.b32 $2, $1, 0xFFFF0000;", "mov.b32 g, $2;"] if bfloat else ["cvt.f32.f16 g, h;"]
    lines += ["sub.f32 f, f, g;", f"cvt.rn.{dtype}.f32 h, f;", "mov.b32 $2, {h, h};"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def word_asm(layout: GroupLayout, bfloat: bool) -> str:
    """PTX: $0 to $7 = the codes of a word $8, decoded, pair by pair; $9 to $11: of `spread_asm`."""
    dtype, exact = "bf16" if bfloat else "f16", is_exact(layout, bfloat)
    lines = [".reg .b32 t, a;"]
    for p in range(4):
        lines += [f"shr.b32 t, $8, {4 * p};"] if p else []
        # (source & mask) | number
        lines.append(f"lop3.b32 a, {'t' if p else '$8'}, 0x000F000F, 0x{NUMBERS[bfloat]:08X}, 0xEA;")
        lines.append(f"sub.{dtype}x2 a, a, $9;")
        lines += [] if exact else [f"mul.{dtype}x2 t, a, $11;"]
        lines.append(f"mul.{dtype}x2 a, a, $10;" if exact else f"fma.rn.{dtype}x2 a, a, $10, t;")
        lines.append(f"mov.b32 {{${2 * p}, ${2 * p + 1}}}, a;")
    return "{\n" + "\n".join(lines) + "\n}"


SPREAD_CONSTRAINTS, WORD_CONSTRAINTS = (
    tl.constexpr(",".join([f"=&{kind}"] * outputs + ["r"] * inputs))
    for kind, outputs, inputs in (("r", 3, 2), ("h", 8, 4))
)


@triton.constexpr_function
def types(dtype: tl.dtype, count: int) -> tuple[tl.dtype, ...]:
    return (dtype,) * count


@triton.jit
def order_steps(x_MT):
    """Tokens in the order of decoded columns."""
    rows: tl.constexpr = x_MT.shape[0]
    columns: tl.constexpr = x_MT.shape[1]
    return x_MT.reshape(rows, columns // 32, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(rows, columns)


@triton.jit
def load_words(words, rows_O, strip, half, layout: tl.constexpr):
    """int32 [O, W]: word 4 t + step of half a strip."""
    base_O = ((rows_O // ROWS_C * layout.strips + strip) * 2 + half) * (ROWS_C * WORDS_C) + rows_O % ROWS_C * WORDS_C
    return tl.load(words + base_O[:, None] + tl.arange(0, WORDS_C)[None, :])


@triton.jit
def load_scales(scales, groups_G, strip, half, layout: tl.constexpr):
    """int32 [O, P]: the bits of the scales of 16 rows of each row group; other bits than the low 16 are undefined."""
    count: tl.constexpr = groups_G.shape[0]
    P: tl.constexpr = groups_of_half(layout)
    unit_G = groups_G * layout.units + strip // layout.strips_per_unit
    place_G8P = (unit_G[:, None] * 8 + tl.arange(0, 8)[None, :])[:, :, None] * layout.groups
    if layout.groups > 1:
        place_G8P += half * P
    pairs_G8P = tl.load(scales.to(tl.pointer_type(tl.int32)) + place_G8P + tl.arange(0, P)[None, None, :])
    return tl.join(pairs_G8P, pairs_G8P >> 16).permute(0, 3, 1, 2).reshape(count * ROWS_C, P)


@triton.jit
def load_zeros(zeros, groups_G, strip, half, layout: tl.constexpr):
    """int32 [O, P]: zero points as `load_scales` loads scales."""
    count: tl.constexpr = groups_G.shape[0]
    P: tl.constexpr = groups_of_half(layout)
    unit_G = groups_G * layout.units + strip // layout.strips_per_unit
    # Bytes are ordered by row g, group of the strip and half of the rows.
    words: tl.constexpr = 4 * layout.groups
    zeros_GF = unit_G[:, None] * words
    if layout.groups == 1:
        zeros_GF = tl.load(zeros.to(tl.pointer_type(tl.int32)) + zeros_GF + tl.arange(0, words)[None, :])
        zeros_G8PH = tl.join(_two_bytes(zeros_GF), _two_bytes(zeros_GF >> 16)).permute(0, 1, 3, 2)
    elif layout.groups == 2:
        zeros_GF = tl.load(zeros.to(tl.pointer_type(tl.int32)) + zeros_GF + tl.arange(0, words)[None, :])
        zeros_G8PH = _two_bytes(zeros_GF >> (half * 16))
    else:
        zeros_G8F = zeros_GF[:, :, None] + (tl.arange(0, 8) * (layout.groups // 2))[None, :, None]
        place_F = half * (P // 2) + tl.arange(0, P // 2)
        zeros_G8F = tl.load(zeros.to(tl.pointer_type(tl.int32)) + zeros_G8F + place_F[None, None, :])
        zeros_G8PH = tl.join(_two_bytes(zeros_G8F), _two_bytes(zeros_G8F >> 16)).permute(0, 1, 2, 4, 3)
    return zeros_G8PH.reshape(count, 8, P, 2).permute(0, 3, 1, 2).reshape(count * ROWS_C, P)


@triton.jit
def _two_bytes(words):
    """The low two bytes of each word, side by side."""
    return tl.join(words & 255, (words >> 8) & 255)


@triton.jit
def _for_words(values_OP):
    """[O, P] to [O, t, step]."""
    rows: tl.constexpr = values_OP.shape[0]
    groups: tl.constexpr = values_OP.shape[1]
    steps = values_OP.reshape(rows, groups, 1).broadcast_to(rows, groups, 4 // groups)
    return steps.reshape(rows, 1, 4).broadcast_to(rows, 4, 4)


@triton.jit
def plain_codes(words, scales_OP, zeros_OP, place: tl.constexpr, layout: tl.constexpr, dtype: tl.constexpr):
    """What `word_asm` computes of the codes at bit `place` of words, in plain operations; the numbers' bits."""
    if layout.bfloat:
        scales_OP = (scales_OP << 16).to(tl.float32, bitcast=True)
    else:
        scales_OP = scales_OP.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    codes = ((words >> place) & 15) - _for_words(zeros_OP)
    return (codes.to(tl.float32) * _for_words(scales_OP)).to(dtype).to(tl.int16, bitcast=True)


@triton.jit
def decode_half(words_OW, scales_OP, zeros_OP, layout: tl.constexpr, dtype: tl.constexpr):
    """Half a strip [O, C] in `dtype`."""
    rows: tl.constexpr = words_OW.shape[0]
    words = words_OW.reshape(rows, 4, 4)
    if INTERPRETED:
        v0 = plain_codes(words, scales_OP, zeros_OP, 0, layout, dtype)
        v1 = plain_codes(words, scales_OP, zeros_OP, 16, layout, dtype)
        v2 = plain_codes(words, scales_OP, zeros_OP, 4, layout, dtype)
        v3 = plain_codes(words, scales_OP, zeros_OP, 20, layout, dtype)
        v4 = plain_codes(words, scales_OP, zeros_OP, 8, layout, dtype)
        v5 = plain_codes(words, scales_OP, zeros_OP, 24, layout, dtype)
        v6 = plain_codes(words, scales_OP, zeros_OP, 12, layout, dtype)
        v7 = plain_codes(words, scales_OP, zeros_OP, 28, layout, dtype)
    else:
        bfloat: tl.constexpr = dtype == tl.bfloat16
        zero, high, low = tl.inline_asm_elementwise(
            spread_asm(layout, bfloat), SPREAD_CONSTRAINTS, (scales_OP, zeros_OP), dtype=types(tl.int32, 3),
            is_pure=True, pack=1,
        )  # fmt: skip
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            word_asm(layout, bfloat), WORD_CONSTRAINTS, (words, _for_words(zero), _for_words(high), _for_words(low)),
            dtype=types(tl.int16, 8), is_pure=True, pack=1,
        )  # fmt: skip
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    # [O, t, step, both bits of the pair, e]
    values = tl.join(even, odd).permute(0, 2, 3, 4, 1, 5).reshape(rows, COLUMNS_C)
    return values.to(dtype, bitcast=True)


@triton.jit
def wide_product(
    x,  # in the order of decoded columns, padded to whole strips
    words,
    scales,
    zeros,
    first_row,
    first_token,
    pid_s,
    M,
    N,
    x_stride,
    order,  # of the rows of x, see `rows_of_x`, or None
    fan: tl.constexpr,
    layout: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
    pdl: tl.constexpr,
):
    """W xᵀ over every `splits`-th half of a strip from pid_s on, float32 [O, M]."""
    dtype: tl.constexpr = x.dtype.element_ty
    # Row groups beyond the last repeat it; their sums are not stored.
    last = tl.cdiv(N, ROWS_C) - 1
    rows_O, rows_M = first_row + tl.arange(0, BLOCK_N), first_token + tl.arange(0, BLOCK_M)
    rows_O = tl.minimum(rows_O // ROWS_C, last) * ROWS_C + rows_O % ROWS_C
    groups_G = tl.minimum(first_row // ROWS_C + tl.arange(0, BLOCK_N // ROWS_C), last)
    x_rows = x + rows_of_x(rows_M, M, order, fan).to(tl.int64)[:, None] * x_stride + tl.arange(0, COLUMNS_C)[None, :]
    acc_OM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if pdl:
        gdc_wait()
    for number in tl.range(pid_s, 2 * layout.strips, splits, num_stages=stages):
        strip, half = number // 2, number % 2
        words_OW = load_words(words, rows_O, strip, half, layout)
        scales_OP = load_scales(scales, groups_G, strip, half, layout)
        if layout.symmetric:
            zeros_OP = tl.full(scales_OP.shape, layout.offset, tl.int32)
        else:
            zeros_OP = load_zeros(zeros, groups_G, strip, half, layout)
        x_MC = tl.load(x_rows + number * COLUMNS_C, mask=(rows_M < M)[:, None], other=0.0)
        acc_OM = dot(decode_half(words_OW, scales_OP, zeros_OP, layout, dtype), tl.trans(x_MC), acc_OM)
    return acc_OM
