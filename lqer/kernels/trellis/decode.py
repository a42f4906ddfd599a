"""Device functions that decode trellis codes and multiply them with tokens, in registers (layout/trellis.py).

On a GPU a warp multiplies a row group with tokens in one block of PTX. A window of the codes is an address of the
table in shared memory: one shift, one mask and one look-up give one weight or two, which are half a register of a
tensor core operand or a whole one. In Triton's interpreter the same is computed in plain operations.

Triton puts the table there: `share_table` looks values up in it with `tl.gather`, for which it is copied to the
beginning of shared memory. It stays there until Triton needs this memory again, which is after the product.

Shapes: M tokens, O rows of W, C columns of a row group, S words of the table, T threads of a program. What
`load_words`, `no_sums` and `add_products` return are tuples of tensors [T].
"""

import triton
import triton.language as tl

from lqer.kernels.decode import ROWS_C
from lqer.kernels.layout.tiles import TILE_K
from lqer.kernels.layout.trellis import LANES, WEIGHTS, TrellisLayout

TILE_C, LANES_C, WEIGHTS_C = tl.constexpr(TILE_K), tl.constexpr(LANES), tl.constexpr(WEIGHTS)
# A tensor core multiplies eight columns: tokens.
TOKENS_AT_ONCE = 8
TOKENS_AT_ONCE_C = tl.constexpr(TOKENS_AT_ONCE)


@triton.constexpr_function
def field_asm(words: list[str], start: int, width: int, scale: int) -> list[str]:
    """PTX: t = table + the `width` bits from bit `start` of consecutive words on, times 2^scale."""
    word, bit = divmod(start, 32)
    shift, mask = bit - scale, ((1 << width) - 1) << scale
    if bit + width > 32:
        lines, source = [f"shf.r.clamp.b32 t, {words[word]}, {words[word + 1]}, {shift};"], "t"
    elif shift:
        lines, source = [f"{'shr' if shift > 0 else 'shl'}.b32 t, {words[word]}, {abs(shift)};"], "t"
    else:
        lines, source = [], words[word]
    # (source & mask) | copy
    return [*lines, f"lop3.b32 t, {source}, 0x{mask:X}, copy, 0xEA;", "add.u32 t, t, table;"]


@triton.constexpr_function
def decode_asm(layout: TrellisLayout) -> str:
    """PTX: $(16 h + p) = weights 2 p and 2 p + 1 of a lane's 32 of its ring h, as two float16; from its 2 k words."""
    bits, width = layout.bits, layout.index_bits(layout.pairs)
    scale = 1 if layout.halves else 2 + (layout.copies - 1).bit_length()
    load = "ld.shared.u16" if layout.halves else "ld.shared.b32"
    lines = [
        ".reg .b32 t, next, table, copy, tail, lower, upper;",
        "mov.u32 table, global_smem;",
        "mov.u32 next, %laneid;",
        f"and.b32 copy, next, {layout.copies - 1};",
        "shl.b32 copy, copy, 2;",
        "add.u32 next, next, 4;",
    ]
    for ring in range(2):
        words = [f"${WEIGHTS + ring * bits + n}" for n in range(bits)]
        # The lane number of a shuffle is taken modulo 32.
        lines.append(f"shfl.sync.idx.b32 tail, {words[0]}, next, 31, 0xFFFFFFFF;")
        words.append("tail")
        for p in range(WEIGHTS // 2):
            value = f"${WEIGHTS // 2 * ring + p}"
            if layout.pairs:
                lines += [*field_asm(words, 2 * p * bits, width, scale), f"{load} {value}, [t];"]
                continue
            for half, i in (("lower", 2 * p), ("upper", 2 * p + 1)):
                lines += [*field_asm(words, i * bits, width, scale), f"{load} {half}, [t];"]
            lines.append(f"prmt.b32 {value}, lower, upper, 0x5410;")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def decode_constraints(layout: TrellisLayout) -> str:
    return ",".join(["=&r"] * WEIGHTS + ["r"] * (2 * layout.bits + 1))


@triton.constexpr_function
def token_asm() -> str:
    """PTX: $0 to $15 = a lane's columns of a token, 16 for either ring, $16 and $17 = two steps; from their places."""
    lines = []
    for first in range(0, 16, 4):
        x = ", ".join(f"${first + n}" for n in range(4))
        lines.append(f"ld.global.v4.b32 {{{x}}}, [$18+{first // 8 * TILE_K + first % 8 * 4}];")
    lines += ["ld.global.b32 $16, [$19];", "ld.global.b32 $17, [$20];"]
    return "\n".join(lines)


@triton.constexpr_function
def product_asm(blocks: int) -> str:
    """PTX: add the product of a row group and 8 `blocks` tokens to a warp's sums.

    Outputs $(4 i + 2 h + e): the sum of row 2 g + h and token 2 t + e of block i, in lane 4 g + t. Inputs: the same
    sums before, the outputs of `decode_asm`, and those of `token_asm` for each block.
    """
    sums = 4 * blocks
    lines = [f".reg .f32 d<{sums}>, step;", *(f"mov.b32 d{n}, 0;" for n in range(sums))]
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    for ring in range(2):
        v = [f"${2 * sums + WEIGHTS // 2 * ring + p}" for p in range(WEIGHTS // 2)]
        for j in range(4):
            for i in range(blocks):
                d = "{" + ", ".join(f"d{4 * i + n}" for n in range(4)) + "}"
                x = 2 * sums + WEIGHTS + 18 * i + 8 * ring + 2 * j
                a = f"{{{v[2 * j]}, {v[2 * j + 8]}, {v[2 * j + 1]}, {v[2 * j + 9]}}}"
                lines.append(f"{mma} {d}, {a}, {{${x}, ${x + 1}}}, {d};")
    for i in range(blocks):
        for n in range(4):
            lines.append(f"mov.b32 step, ${2 * sums + WEIGHTS + 18 * i + 16 + n % 2};")
            lines.append(f"fma.rn.f32 ${4 * i + n}, d{4 * i + n}, step, ${sums + 4 * i + n};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def product_constraints(blocks: int) -> str:
    sums = 4 * blocks
    return ",".join(["=&f"] * sums + ["f"] * sums + ["r"] * (WEIGHTS + 18 * blocks))


@triton.constexpr_function
def load_asm(span: int, layout: TrellisLayout) -> str:
    """PTX: load a lane's words of `span` row groups, from the address of the first."""
    lines, at_once, count = [], layout.words_at_once, 2 * layout.bits * span
    for first in range(0, count, at_once):
        outputs = ", ".join(f"${first + n}" for n in range(at_once))
        place = f"${count}+{first * 4 * LANES}"
        lines.append(f"ld.global.nc.L1::no_allocate.v{at_once}.b32 {{{outputs}}}, [{place}];")
    return "\n".join(lines)


@triton.constexpr_function
def load_constraints(outputs: int, places: int) -> str:
    return ",".join(["=&r"] * outputs + ["l"] * places)


@triton.constexpr_function
def types(dtype: tl.dtype, count: int) -> tuple[tl.dtype, ...]:
    return (dtype,) * count


@triton.jit
def load_words(words, group_T, lane_T, first, layout: tl.constexpr, span: tl.constexpr):
    """The words of each thread, of `span` row groups from tile `first` on: 2 k `span` tensors."""
    at_once: tl.constexpr = layout.words_at_once
    lane_words: tl.constexpr = 2 * layout.bits
    place_T = words + (group_T * layout.tiles + first) * (LANES_C * lane_words) + lane_T * at_once
    return tl.inline_asm_elementwise(
        load_asm(span, layout), load_constraints(span * lane_words, 1), [place_T.to(tl.int64)],
        dtype=types(tl.int32, span * lane_words), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def share_table(table, thread_T, layout: tl.constexpr):
    """Put the table at the beginning of shared memory; int32 [T], which `decode` takes to come after that."""
    return tl.gather(tl.load(table + tl.arange(0, layout.table_words)), thread_T, 0)


@triton.jit
def decode(words, shared_T, layout: tl.constexpr):
    """The weights of a row group, 32 tensors of two float16. words: the lane's; shared_T: of `share_table`."""
    return tl.inline_asm_elementwise(
        decode_asm(layout), decode_constraints(layout), words + (shared_T,),  # noqa: RUF005
        dtype=types(tl.int32, WEIGHTS_C), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def no_sums(lane_T, blocks: tl.constexpr):
    """Initial sums of `add_products`: four zeros per thread for each eight tokens."""
    if blocks == 1:
        zero_T = tl.zeros(lane_T.shape, tl.float32)
        return zero_T, zero_T, zero_T, zero_T
    else:
        half = no_sums(lane_T, blocks // 2)
        return half + half


@triton.jit
def load_tokens(x, steps, lane_T, first, tile, M, tiles: tl.constexpr, blocks: tl.constexpr):
    """For each eight tokens from `first` on, the columns of a tile and the two steps that a thread needs.

    Lane 4 g + t reads 32 columns of token g of a block and has the sums of tokens 2 t and 2 t + 1. Tokens from M on are
    replaced by the last one.
    """
    if blocks == 1:
        token_T, summed_T = tl.minimum(first + lane_T // 4, M - 1), first + lane_T % 4 * 2
        one_T, other_T = tl.minimum(summed_T, M - 1), tl.minimum(summed_T + 1, M - 1)
        column_T = (token_T * tiles + tile) * TILE_C + lane_T % 4 * 16
        step = steps + tile
        places = (
            (x + column_T).to(tl.int64),
            (step + one_T * tiles).to(tl.int64),
            (step + other_T * tiles).to(tl.int64),
        )
        return tl.inline_asm_elementwise(
            token_asm(), load_constraints(18, 3), places, dtype=types(tl.int32, 18), is_pure=False, pack=1
        )
    else:
        half: tl.constexpr = blocks // 2
        others = load_tokens(x, steps, lane_T, first + half * TOKENS_AT_ONCE_C, tile, M, tiles, half)
        return load_tokens(x, steps, lane_T, first, tile, M, tiles, half) + others


@triton.jit
def add_products(sums, weights, tokens, blocks: tl.constexpr):
    """`sums` + the products of a row group. weights: of `decode`; tokens: of `load_tokens`."""
    return tl.inline_asm_elementwise(
        product_asm(blocks), product_constraints(blocks), sums + weights + tokens,
        dtype=types(tl.float32, 4 * blocks), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def look_up(states, table, layout: tl.constexpr):
    """The float32 value of each state, in plain operations."""
    if layout.sums_bytes:
        product = (states * layout.signed_multiplier).to(tl.int32)
        bytes_sum = (product << 24 >> 24) + (product << 16 >> 24) + (product << 8 >> 24) + (product >> 24)
        return bytes_sum.to(tl.float32) / 128
    else:
        if layout.halves:
            halves = tl.load(table + states // 2) >> (states % 2 * 16)
        else:
            halves = tl.load(table + states * layout.copies)
        return halves.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def plain_values(words, table, rows_O, columns_C, layout: tl.constexpr):
    """The values of the weights at these rows and columns, float32 [O, C], in plain operations."""
    bits: tl.constexpr = layout.bits
    at_once: tl.constexpr = layout.words_at_once
    ring_C = columns_C % TILE_C // 16
    group_OC = (rows_O // ROWS_C)[:, None] * layout.tiles + (columns_C // TILE_C)[None, :]
    lane_OC = (rows_O % ROWS_C // 2 * 4)[:, None] + (ring_C % 4)[None, :]
    start_OC = ((rows_O % 2 * 16)[:, None] + (columns_C % 16)[None, :]) * bits
    word_OC = start_OC // 32
    first_OC = (ring_C // 4 * bits)[None, :] + word_OC
    wraps_OC = word_OC == bits - 1
    second_OC = tl.where(wraps_OC, first_OC + 1 - bits, first_OC + 1)
    next_OC = tl.where(wraps_OC, (lane_OC + 4) % LANES_C, lane_OC)
    base_OC = words + group_OC * (LANES_C * 2 * bits)
    low_OC = tl.load(base_OC + (first_OC // at_once * LANES_C + lane_OC) * at_once + first_OC % at_once)
    high_OC = tl.load(base_OC + (second_OC // at_once * LANES_C + next_OC) * at_once + second_OC % at_once)
    both_OC = (low_OC.to(tl.int64) & 0xFFFFFFFF) | (high_OC.to(tl.int64) << 32)
    state_OC = (both_OC >> (start_OC % 32).to(tl.int64)) & ((1 << layout.state_bits) - 1)
    return look_up(state_OC.to(tl.int32), table, layout)


@triton.jit
def plain_product(words, table, x, steps, rows_O, rows_M, tile, M, layout: tl.constexpr):
    """The product [O, M] of row groups with tokens, in plain operations."""
    columns_C = tile * TILE_C + tl.arange(0, TILE_C)
    values_OC = plain_values(words, table, rows_O, columns_C, layout)
    tokens_M = tl.minimum(rows_M, M - 1)
    x_CM = tl.load(x + (tokens_M * (layout.tiles * TILE_C))[None, :] + columns_C[:, None]).to(tl.float32)
    return tl.dot(values_OC, x_CM) * tl.load(steps + tokens_M * layout.tiles + tile)[None, :]
