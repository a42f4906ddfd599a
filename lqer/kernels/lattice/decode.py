"""Device functions that decode units of lattice codes and multiply them with tokens, in registers (layout/lattice.py).

On a GPU a warp multiplies a tile of 16 rows with tokens in one block of PTX. The words of a code are almost directly
operands of the integer tensor cores: the low halves of their bytes, n, and the high halves, 16 n, are unsigned bytes,
each accumulated separately. The offset of n from the point that it represents goes into the initial value of the sums:
16 sum n x - 120 sum x = 32 sum (n / 2 - 15/4) x. All of this is exact in 32 bits. In Triton's interpreter the same is
computed in plain operations.

Rows of the codebook are looked up in shared memory, in 16 interleaved copies, one for every second lane of a warp, to
avoid bank conflicts. Triton does not know of this table: `share_table` reserves and fills it, and returns its address.

Shapes: M tokens, O rows of W, U units of a row in a tile, C columns of a tile, T threads of a program. An argument
without a suffix that `load_units`, `no_sums` and `add_products` return is a tuple of tensors [T].
"""

import triton
import triton.language as tl

from lqer.kernels.decode import ROWS_C, _join4
from lqer.kernels.layout.codes import ROWS
from lqer.kernels.layout.lattice import ROWS_OF_A, UNITS
from lqer.kernels.layout.tiles import TILE_K

TILE_C, UNITS_C = tl.constexpr(TILE_K), tl.constexpr(UNITS)
COPIES = 16
COPIES_C = tl.constexpr(COPIES)
TABLE_BYTES = 4 * ROWS_OF_A * COPIES
TILE_BYTES = 8 * ROWS * UNITS  # of a warp's rows
LARGEST_SPAN = 16
# A tensor core multiplies eight columns: h and l of four tokens.
TOKENS_AT_ONCE = 4
TOKENS_AT_ONCE_C = tl.constexpr(TOKENS_AT_ONCE)


def share_asm(warps: int) -> str:
    """PTX: $0 = the address of the table in shared memory, filled by all threads from the rows at $1."""
    quads = TABLE_BYTES // 16
    turns = quads // (32 * warps)
    lines = [f".shared .align 16 .b8 rows_of_a[{TABLE_BYTES}];", f".reg .b32 i, base, address, v<{turns}>;"]
    lines += [".reg .b64 source, offset;", "mov.u32 i, %tid.x;", "mov.u32 base, rows_of_a;"]
    # The 16 bytes number i are copies of row i / 4.
    lines += ["shr.u32 address, i, 2;", "mul.wide.u32 offset, address, 4;", "add.s64 source, $1, offset;"]
    lines += ["shl.b32 address, i, 4;", "add.u32 address, address, base;"]
    lines += [f"ld.global.nc.b32 v{turn}, [source+{32 * warps * turn}];" for turn in range(turns)]
    for turn in range(turns):
        value = f"v{turn}"
        lines.append(f"st.shared.v4.b32 [address+{512 * warps * turn}], {{{value}, {value}, {value}, {value}}};")
    return "{\n" + "\n".join([*lines, "bar.sync 0;", "mov.u32 $0, base;"]) + "\n}"


@triton.constexpr_function
def sign_asm(unit: str, low: str, b: str, z: str, y: str) -> list[str]:
    """PTX: low, b = the halves of a unit; bit 4 k + c of z, which is bit 4 k + c - 2 of y: sign k of code c."""
    lines = [f"mov.b64 {{{low}, {b}}}, {unit};", f"shr.u32 t, {b}, 4;"]
    # (b & mask) ^ t
    return [*lines, f"lop3.b32 {z}, {b}, 0xFFFFFFF0, t, 0x6A;", f"shr.u32 {y}, {z}, 2;"]


@triton.constexpr_function
def index_asm(c: int, table: str, low: str, b: str, z: str, y: str) -> list[str]:
    """PTX: w = the nibbles of code c without signs, s = what to flip in them. table: address of this lane's copy."""
    index = (
        f"shl.b32 t, {low}, 6;",
        f"shr.u32 t, {low}, 3;",
        f"shr.u32 t, {low}, 12;",
        f"shf.r.clamp.b32 t, {low}, {b}, 21;",
    )
    # Multiply a sign bit of each nibble to 14.
    mask, factor = ("0x11111111", 14) if c % 2 == 0 else ("0x22222222", 7)
    return [
        index[c], f"and.b32 t, t, 0x{TABLE_BYTES - 4 * COPIES:X};", f"add.u32 t, t, {table};", "ld.shared.b32 w, [t];",
        f"and.b32 s, {z if c < 2 else y}, {mask};", f"mul.lo.u32 s, s, {factor};",
    ]  # fmt: skip


def words_asm(unit: str, table: str, row: int) -> list[str]:
    """PTX: tensor core operands from the four codes of `unit`.

    e{c}{row}: the even coordinates of code c; o{c}{row}: the odd ones. table: the address of this lane's copy.
    """
    names = ("low", "b", "z", "y")
    lines = sign_asm(unit, *names)
    for c in range(4):
        lines += index_asm(c, table, *names)
        # (w ^ s) & mask
        lines.append(f"lop3.b32 e{c}{row}, w, s, 0x0F0F0F0F, 0x28;")
        lines.append(f"lop3.b32 o{c}{row}, w, s, 0xF0F0F0F0, 0x28;")
    return lines


def product_asm() -> str:
    """PTX: add the product of a tile of 16 rows and four tokens to a warp's sums.

    Outputs $0 and $1: the sums of rows g and g + 8 and token t, in lane 4 g + t. Inputs: the same sums before, the
    units of both rows, the table, and the addresses of the lane's bytes and of its step.
    """
    lines = [".reg .b32 low, b, y, z, s, t, w, h, l, start;", ".reg .f32 step, f;"]
    lines.append(
        ".reg .b32 " + ", ".join(f"{kind}{c}{row}" for kind in "eo" for c in range(4) for row in range(2)) + ";"
    )
    lines += [".reg .b32 x<8>, d<8>;"]
    lines += words_asm("$4", "$6", 0) + words_asm("$5", "$6", 1)
    mma = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
    lines.append("ld.global.v2.b32 {step, start}, [$8];")
    lines.append("ld.global.v4.b32 {x0, x1, x2, x3}, [$7];")
    lines.append("ld.global.v4.b32 {x4, x5, x6, x7}, [$7+16];")
    for o, kind in enumerate("eo"):
        d = [f"d{4 * o + k}" for k in range(4)]
        begin = "{0, start, 0, start}" if o else "{0, 0, 0, 0}"
        for p in range(2):
            a = f"{{{kind}{2 * p}0, {kind}{2 * p}1, {kind}{2 * p + 1}0, {kind}{2 * p + 1}1}}"
            b = f"{{x{4 * p + 2 * o}, x{4 * p + 2 * o + 1}}}"
            result = "{" + ", ".join(d) + "}"
            lines.append(f"{mma} {result}, {a}, {b}, {begin if p == 0 else result};")
    for h in range(2):
        # 16 times the sum of the even coordinates plus that of the odd ones; then 256 h + l.
        lines += [f"mad.lo.s32 h, d{2 * h}, 16, d{4 + 2 * h};", f"mad.lo.s32 l, d{2 * h + 1}, 16, d{5 + 2 * h};"]
        lines += ["mad.lo.s32 l, h, 256, l;", "cvt.rn.f32.s32 f, l;", f"fma.rn.f32 ${h}, f, step, ${2 + h};"]
    return "{\n" + "\n".join(lines) + "\n}"


def load_asm(span: int) -> str:
    """PTX: load the units of two rows of `span` tiles, from the address of the first."""
    loads = (
        f"ld.global.nc.L1::no_allocate.v2.b64 {{${2 * i}, ${2 * i + 1}}}, [${2 * span}+{TILE_BYTES * i}];"
        for i in range(span)
    )
    return "\n".join(loads)


SHARE = tl.constexpr({warps: share_asm(warps) for warps in (1, 2, 4, 8, 16)})
PRODUCT, PRODUCT_CONSTRAINTS = tl.constexpr(product_asm()), tl.constexpr("=&f,=&f,f,f,l,l,r,l,l")
PRODUCT_TYPES = tl.constexpr((tl.float32, tl.float32))
LOADS = tl.constexpr(tuple(load_asm(span) for span in range(LARGEST_SPAN + 1)))
LOAD_CONSTRAINTS = tl.constexpr(tuple(",".join(["=&l"] * 2 * span + ["l"]) for span in range(LARGEST_SPAN + 1)))
LOAD_TYPES = tl.constexpr(tuple((tl.int64,) * 2 * span for span in range(LARGEST_SPAN + 1)))


@triton.jit
def share_table(table, warps: tl.constexpr):
    """Fill the table of `add_products`; its address in shared memory."""
    return tl.inline_asm_elementwise(SHARE[warps], "=r,l", [table.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def unit_places(units, rows_O, first, tiles: tl.constexpr):
    """Addresses of the units [O, 4] of tile `first`."""
    row_O = rows_O % ROWS_C
    base_O = (rows_O // ROWS_C) * (tiles * ROWS_C * UNITS_C) + row_O % 8 * (2 * UNITS_C) + row_O // 8
    return units + (base_O + first * (ROWS_C * UNITS_C))[:, None] + 2 * tl.arange(0, UNITS_C)[None, :]


@triton.jit
def load_units(units, group_T, lane_T, first, tiles: tl.constexpr, span: tl.constexpr):
    """The units of each thread, of `span` tiles from `first` on: 2 `span` tensors."""
    place_T = units + group_T * (tiles * ROWS_C * UNITS_C) + first * (ROWS_C * UNITS_C) + lane_T * 2
    return tl.inline_asm_elementwise(
        LOADS[span], LOAD_CONSTRAINTS[span], [place_T.to(tl.int64)], dtype=LOAD_TYPES[span], is_pure=False, pack=1
    )


@triton.jit
def token_places(x, steps, lane_T, tile, M, tiles: tl.constexpr):
    """Of four tokens, the addresses of the bytes and of the steps that a thread reads of a tile.

    Lane 4 g + t reads the h (even g) or l (odd g) of token g // 2 and has the sums of token t. Tokens from M on are
    replaced by the last one.
    """
    token_T, summed_T = tl.minimum(lane_T // 8, M - 1), tl.minimum(lane_T % 4, M - 1)
    byte_T = ((token_T * 2 + lane_T // 4 % 2) * tiles + tile) * TILE_C + lane_T % 4 * 32
    return (x + byte_T).to(tl.int64), (steps + (summed_T * tiles + tile) * 2).to(tl.int64)


@triton.jit
def add_products(sums, pair, copy_T, places, tile: tl.constexpr):
    """`sums` + the products of a tile. pair: the thread's units of it; places: `token_places` of the first tile."""
    arguments = sums + pair + (copy_T, places[0] + tile * TILE_C, places[1] + tile * 8)
    return tl.inline_asm_elementwise(
        PRODUCT, PRODUCT_CONSTRAINTS, arguments, dtype=PRODUCT_TYPES, is_pure=False, pack=1
    )


@triton.jit
def unit_word(units_OU, table, c: tl.constexpr):
    """The word of code c of each unit, in plain operations."""
    row = tl.load(table + ((units_OU >> (9 * c)) & 511).to(tl.int32))
    b = (units_OU >> 32).to(tl.int32)
    z = (b & ~15) ^ ((b >> 4) & 0x0FFFFFFF)
    return row ^ (((z >> c) & 0x11111111) * 14)


@triton.jit
def nibble_values(words, k, dtype: tl.constexpr):
    """Coordinates k of words, as values of lattice points."""
    return (((words >> (4 * k)) & 15).to(tl.float32) * 0.5 - 3.75).to(dtype)


@triton.jit
def token_order(columns):
    """The position in memory of each natural column of x (layout/lattice.py)."""
    inside = columns % TILE_C
    k, code = inside % 8, inside // 8
    return columns - inside + code // 4 * 32 + code // 2 % 2 * 16 + k % 2 * 8 + code % 2 * 4 + k // 2


@triton.jit
def plain_product(units_OU, table, x, steps, rows_M, tile, M, tiles: tl.constexpr):
    """The product [O, M] of a tile of units [O, 4] with tokens, in plain operations."""
    k = tl.arange(0, TILE_C)
    words = _join4(
        unit_word(units_OU, table, 0), unit_word(units_OU, table, 1), unit_word(units_OU, table, 2),
        unit_word(units_OU, table, 3),
    )  # fmt: skip
    rows: tl.constexpr = units_OU.shape[0]
    nibbles = (words.reshape(rows, UNITS_C * 4, 1) >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    n_OC = nibbles.reshape(rows, TILE_C).to(tl.float32)
    tokens_M = tl.minimum(rows_M, M - 1)
    place = x + (tokens_M * 2 * (tiles * TILE_C) + tile * TILE_C)[None, :] + token_order(k)[:, None]
    x_CM = (tl.load(place).to(tl.int32) * 256 + tl.load(place + tiles * TILE_C).to(tl.int32)).to(tl.float32)
    step_M = tl.load(steps + (tokens_M * tiles + tile) * 2).to(tl.float32, bitcast=True)
    start_M = tl.load(steps + (tokens_M * tiles + tile) * 2 + 1)
    return (tl.dot(n_OC, x_CM) * 16 + start_M.to(tl.float32)[None, :]) * step_M[None, :]
