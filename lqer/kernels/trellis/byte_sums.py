"""Device functions that multiply trellis codes of table "bytes" with up to four tokens (layout/trellis.py).

A state's value is the sum of the four signed bytes of a product (lqer.formats.trellis, byte_products.py): four elements
of an operand of the integer tensor cores, which add them.
A weight takes a register of that operand, so a multiplication has eight columns. Tokens are 16-bit integers 256 h + l
with a power of two as step for each token and tile of 128 columns; h and l of a column, four times each, are a register
of two columns of the other operand, so four tokens are multiplied at once. Sums are exact in 32 bits.

    x         int8 [M, 2, IP]         h and l, in natural order
    steps     float32 [M, tiles]      of an integer times the 1 / 128 of values

Lane 4 g + t reads the sixteen columns of ring t, then of ring 4 + t, of token g / 2: its h if g is even. A warp
multiplies `groups` row groups with what it has read and spread.

In Triton's interpreter the same is computed in plain operations.

Shapes: M tokens, O rows of W, C columns of a row group, T threads of a program, K warps along K. Sums, words and tokens
are tuples of tensors [T].
"""

import triton
import triton.language as tl

from lqer.kernels.layout.tiles import TILE_K
from lqer.kernels.layout.trellis import WEIGHTS, TrellisLayout
from lqer.kernels.trellis.byte_products import product_lines, registers_of_ring
from lqer.kernels.trellis.decode import TILE_C, WEIGHTS_C, load_constraints, load_words, plain_values, types

# A tensor core multiplies eight columns, two for each token.
TOKENS_AT_ONCE = 4
TOKENS_AT_ONCE_C = tl.constexpr(TOKENS_AT_ONCE)


@triton.constexpr_function
def token_asm() -> str:
    """PTX: $0 to $7 = a lane's columns of a token, four words of either ring, $8 = a step; from their places."""
    lines = [f"ld.global.v4.b32 {{${n}, ${n + 1}, ${n + 2}, ${n + 3}}}, [$9+{n // 4 * TILE_K // 2}];" for n in (0, 4)]
    return "\n".join([*lines, "ld.global.b32 $8, [$10];"])


@triton.constexpr_function
def values_asm(layout: TrellisLayout) -> str:
    """PTX: $0 to $63 = the sums of bytes of a lane's 64 weights, of either ring in their order, from its 2 k words."""
    count, bits = 2 * WEIGHTS, layout.bits
    lines = [".reg .b32 t, next, tail, product;", f".reg .b32 codes<{registers_of_ring(layout, WEIGHTS)}>;"]
    lines += ["mov.u32 next, %laneid;", "add.u32 next, next, 4;"]
    for half in range(2):
        words = [f"${count + half * bits + n}" for n in range(bits)]
        lines.append(f"shfl.sync.idx.b32 tail, {words[0]}, next, 31, 0xFFFFFFFF;")
        made: set[int] = set()
        for i in range(WEIGHTS):
            lines += product_lines(layout, [*words, "tail"], i, "product", "codes", made)
            lines.append(f"dp4a.s32.s32 ${half * WEIGHTS + i}, product, 0x01010101, 0;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def values_constraints(layout: TrellisLayout) -> str:
    return ",".join(["=&r"] * (2 * WEIGHTS) + ["r"] * (2 * layout.bits))


@triton.jit
def byte_sums(words, layout: tl.constexpr):
    """128 times the values of a lane's weights: 64 int32 tensors [T]. words: of `load_groups`."""
    return tl.inline_asm_elementwise(
        values_asm(layout), values_constraints(layout), words,
        dtype=types(tl.int32, 2 * WEIGHTS_C), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def uncounted_next(turn):
    """turn + 1, in a way that the compiler does not see."""
    return tl.inline_asm_elementwise("add.s32 $0, $1, 1;", "=r,r", [turn], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_groups(words, group_T, lane_T, tile, last, layout: tl.constexpr, groups: tl.constexpr):
    """The words of each thread, of a tile of `groups` row groups from group_T on; the last one instead of any after."""
    if groups == 1:
        return load_words(words, tl.minimum(group_T, last), lane_T, tile, layout, 1)
    else:
        half: tl.constexpr = groups // 2
        others = load_groups(words, group_T + half, lane_T, tile, last, layout, half)
        return load_groups(words, group_T, lane_T, tile, last, layout, half) + others


@triton.jit
def load_tokens(x, steps, lane_T, tile_T, M, tiles: tl.constexpr):
    """The columns of a tile and the step that a thread needs, of four tokens.

    Lane 4 g + t reads 32 columns of a part of token g / 2 and has sums of token t. Tokens from M on are replaced by the
    last one. Beyond the last tile the step is zero.
    """
    present_T = tl.minimum(tile_T, tiles - 1)
    row_T = tl.minimum(lane_T // 8, M - 1) * 2 + lane_T // 4 % 2
    place_T = x + (row_T * tiles + present_T) * TILE_C + lane_T % 4 * 16
    step_T = steps + tl.minimum(lane_T % 4, M - 1) * tiles + present_T
    loaded = tl.inline_asm_elementwise(
        token_asm(), load_constraints(9, 2), (place_T.to(tl.int64), step_T.to(tl.int64)),
        dtype=types(tl.int32, 9), is_pure=False, pack=1,
    )  # fmt: skip
    return loaded[:8] + (tl.where(tile_T < tiles, loaded[8], 0),)  # noqa: RUF005


@triton.jit
def joined(values, count: tl.constexpr):
    """`count` tensors [T], a power of two, as one [T, count]."""
    if count == 2:
        return tl.join(values[0], values[1])
    else:
        half: tl.constexpr = count // 2
        pair = tl.join(joined(values[:half], half), joined(values[half:], half))
        return pair.permute(0, 2, 1).reshape(pair.shape[0], count)


@triton.jit
def plain_product(words, x, steps, rows_O, rows_M, tile, M, layout: tl.constexpr):
    """The product [O, M] of row groups with tokens, in plain operations."""
    columns_C = tile * TILE_C + tl.arange(0, TILE_C)
    values_OC = plain_values(words, None, rows_O, columns_C, layout)
    tokens_M = tl.minimum(rows_M, M - 1)
    padded: tl.constexpr = layout.tiles * TILE_C
    place_CM = x + (tokens_M * (2 * padded))[None, :] + columns_C[:, None]
    x_CM = tl.load(place_CM).to(tl.float32) * 256 + tl.load(place_CM + padded).to(tl.float32)
    # Steps are those of integer sums of bytes, 128 for each unit of a value.
    return tl.dot(values_OC * 128, x_CM) * tl.load(steps + tokens_M * layout.tiles + tile)[None, :]
