"""Device functions that turn units of lattice codes into points, in registers (see lattice.py).

On a GPU a unit becomes its 32 values in one piece of PTX. 0x4100 | n << 3 are the bits of the bfloat16 8 + n / 2,
0x4800 | n << 6 those of the float16; less 11.75 that is the point, exactly. Two values share each instruction. Every
value is an output of its own: what Triton makes of the order of elements in registers does not matter. The interpreter
takes the same steps in plain operations.

Rows of the codebook are looked up in shared memory, which a gather reads about four times as fast as the first cache.
Nothing of Triton knows of that table: `share_table` reserves, aligns and fills it, and returns where it is.
"""

import triton
import triton.language as tl

from .decode import INTERPRETED, ROWS_C, _join4
from .lattice import ROWS_OF_A, TILE_K, UNITS

TILE_C, UNITS_C = tl.constexpr(TILE_K), tl.constexpr(UNITS)
TABLE_BYTES = 4 * ROWS_OF_A
LARGEST_SPAN = 16

# Static shared memory begins where the driver's own ends, 1 KB up, whatever alignment is declared: twice the size
# holds an address of which the table's bits are zero, so that or-ing an index to it is adding.
SHARE_TABLE = tl.constexpr(f"""
    {{
    .shared .align 16 .b8 rows_of_a[{2 * TABLE_BYTES}];
    .reg .pred done;
    .reg .b32 i, step, base, address, value;
    .reg .b64 source, offset;
    mov.u32 i, %tid.x;
    mov.u32 step, %ntid.x;
    mov.u32 base, rows_of_a;
    add.u32 base, base, {TABLE_BYTES - 1};
    and.b32 base, base, 0x{(1 << 32) - TABLE_BYTES:08X};
    fill:
    setp.ge.u32 done, i, {ROWS_OF_A};
    @done bra filled;
    mul.wide.u32 offset, i, 4;
    add.s64 source, $1, offset;
    ld.global.nc.b32 value, [source];
    shl.b32 address, i, 2;
    add.u32 address, address, base;
    st.shared.b32 [address], value;
    add.u32 i, i, step;
    bra fill;
    filled:
    bar.sync 0;
    mov.u32 $0, base;
    }}
""")


def words_asm(unit: str, table: str) -> list[str]:
    """PTX that leaves the words of the four codes of `unit` in w0..w3; `table`: the address of the rows."""
    lines = [".reg .b32 low, b, y, z, s, t, w0, w1, w2, w3;", f"mov.b64 {{low, b}}, {unit};", "shr.u32 t, b, 4;"]
    # Bit 4 k + c of z: the sign of coordinate k of code c. (b & mask) ^ t
    lines += ["lop3.b32 z, b, 0xFFFFFFF0, t, 0x6A;", "shr.u32 y, z, 2;"]
    index = ["shl.b32 t, low, 2;", "shr.u32 t, low, 7;", "shr.u32 t, low, 16;", "shf.r.clamp.b32 t, low, b, 25;"]
    for c in range(4):
        # (t & mask) | table
        lines += [index[c], f"lop3.b32 t, t, 0x{TABLE_BYTES - 4:X}, {table}, 0xEA;", f"ld.shared.b32 w{c}, [t];"]
        # A bit of each nibble to 14 of it.
        mask, factor = ("0x11111111", 14) if c % 2 == 0 else ("0x22222222", 7)
        lines += [f"and.b32 s, {'z' if c < 2 else 'y'}, {mask};", f"mul.lo.u32 s, s, {factor};"]
        lines.append(f"xor.b32 w{c}, w{c}, s;")
    return lines


def values_asm(bits: int, one: int, constant: int, kind: str) -> str:
    """PTX from a unit, $32, and the table's address, $33, to its values: $(8 c + 2 j + h), number 4 h + j of code c.

    bits: where n / 2 stands in 16 bits. one: 8 in them. constant: -11.75.
    """
    lines = [*words_asm("$32", "$33"), ".reg .b32 v, m;", f"mov.b32 m, 0x{constant:04X}{constant:04X};"]
    mask = 15 << bits
    for c in range(4):
        for j in range(4):
            shift = f"shl.b32 t, w{c}, {bits - 4 * j};" if 4 * j < bits else f"shr.u32 t, w{c}, {4 * j - bits};"
            lines += [shift, f"lop3.b32 v, t, 0x{mask:04X}{mask:04X}, 0x{one:04X}{one:04X}, 0xEA;"]
            lines += [f"add.rn.{kind} v, v, m;", f"mov.b32 {{${8 * c + 2 * j}, ${8 * c + 2 * j + 1}}}, v;"]
    return "{\n" + "\n".join(lines) + "\n}"


def load_asm(span: int) -> str:
    """PTX: a unit of each of `span` tiles from the address of the first."""
    size = 8 * ROWS_C.value * UNITS
    return "\n".join(f"ld.global.nc.L1::no_allocate.b64 ${i}, [${span}+{size * i}];" for i in range(span))


def tokens_asm() -> str:
    """PTX: 32 values side by side from an address, $32."""
    loads = (f"ld.global.v4.b32 {{v{i}, v{i + 1}, v{i + 2}, v{i + 3}}}, [$32+{4 * i}];" for i in range(0, 16, 4))
    halves = (f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, v{i};" for i in range(16))
    return "{\n" + "\n".join([".reg .b32 v<16>;", *loads, *halves]) + "\n}"


BF16_ASM = tl.constexpr(values_asm(3, 0x4100, 0xC13C, "bf16x2"))
FP16_ASM = tl.constexpr(values_asm(6, 0x4800, 0xC9E0, "f16x2"))
VALUES_CONSTRAINTS = tl.constexpr(",".join(["=&h"] * 32 + ["l", "r"]))
TOKENS_ASM = tl.constexpr(tokens_asm())
TOKENS_CONSTRAINTS = tl.constexpr(",".join(["=&h"] * 32 + ["l"]))
BF16_32 = tl.constexpr((tl.bfloat16,) * 32)
FP16_32 = tl.constexpr((tl.float16,) * 32)
LOADS = tl.constexpr(tuple(load_asm(span) for span in range(LARGEST_SPAN + 1)))
LOAD_CONSTRAINTS = tl.constexpr(tuple(",".join(["=&l"] * span + ["l"]) for span in range(LARGEST_SPAN + 1)))
LOAD_TYPES = tl.constexpr(tuple((tl.int64,) * span for span in range(LARGEST_SPAN + 1)))


@triton.jit
def share_table(table):
    """What `decode_units` looks rows up by: an address in shared memory, or in the interpreter the table itself."""
    if INTERPRETED:
        return table
    else:
        return tl.inline_asm_elementwise(
            SHARE_TABLE, "=r,l", [table.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def unit_places(units, rows_N, first, tiles: tl.constexpr):
    """Where the units [N, 4] of tile number `first` are; those of the next tile are a group of rows further on."""
    base_N = (rows_N // ROWS_C) * (tiles * ROWS_C * UNITS_C) + (rows_N % ROWS_C) * UNITS_C
    return units + (base_N + first * (ROWS_C * UNITS_C))[:, None] + tl.arange(0, UNITS_C)[None, :]


@triton.jit
def _load_plainly(place, span: tl.constexpr):
    if span == 1:
        return (tl.load(place),)
    else:
        half: tl.constexpr = span // 2
        return _load_plainly(place, half) + _load_plainly(place + half * (ROWS_C * UNITS_C), half)


@triton.jit
def load_units(units, rows_N, first, tiles: tl.constexpr, span: tl.constexpr):
    """Units [N, 4] of `span` tiles from number `first` on, a tuple."""
    place = unit_places(units, rows_N, first, tiles)
    if INTERPRETED:
        return _load_plainly(place, span)
    else:
        # In whatever layout the tensor cores want: a load of Triton's would fix one of its own.
        return tl.inline_asm_elementwise(
            LOADS[span], LOAD_CONSTRAINTS[span], [place.to(tl.int64)], dtype=LOAD_TYPES[span], is_pure=True, pack=1
        )


@triton.jit
def unit_word(units_NU, table, c: tl.constexpr):
    """The word of code c of each unit, in plain operations."""
    row = tl.load(table + ((units_NU >> (9 * c)) & 511).to(tl.int32))
    b = (units_NU >> 32).to(tl.int32)
    z = (b & ~15) ^ ((b >> 4) & 0x0FFFFFFF)
    return row ^ (((z >> c) & 0x11111111) * 14)


@triton.jit
def nibble_values(words, k, dtype: tl.constexpr):
    """Coordinates k of words, as points."""
    return (((words >> (4 * k)) & 15).to(tl.float32) * 0.5 - 3.75).to(dtype)


@triton.jit
def _plain_values(units_NU, table, dtype: tl.constexpr):
    rows: tl.constexpr = units_NU.shape[0]
    w0, w1 = unit_word(units_NU, table, 0), unit_word(units_NU, table, 1)
    w2, w3 = unit_word(units_NU, table, 2), unit_word(units_NU, table, 3)
    # [N, t, d, e] to [N, 1, d, t, e, 1], beside j and h
    words = _join4(w0, w1, w2, w3).permute(0, 2, 1, 3).reshape(rows, 1, 2, UNITS_C, 2, 1)
    k = tl.arange(0, 4).reshape(1, 4, 1, 1, 1, 1) + 4 * tl.arange(0, 2).reshape(1, 1, 1, 1, 1, 2)
    return nibble_values(words, k, dtype).reshape(rows, TILE_C)


@triton.jit
def _joined16(v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15):
    """[*lead, 2, 2, 2, 2] of sixteen tensors, the number's highest bit first."""
    return tl.join(
        tl.join(_join4(v0, v4, v8, v12), _join4(v2, v6, v10, v14)),
        tl.join(_join4(v1, v5, v9, v13), _join4(v3, v7, v11, v15)),
    )


@triton.jit
def _joined32(v):
    """[*lead, 2, 2, 2, 2, 2] of a tuple of 32 tensors, the number's highest bit first."""
    low = _joined16(
        v[0], v[2], v[4], v[6], v[8], v[10], v[12], v[14], v[16], v[18], v[20], v[22], v[24], v[26], v[28], v[30]
    )
    high = _joined16(
        v[1], v[3], v[5], v[7], v[9], v[11], v[13], v[15], v[17], v[19], v[21], v[23], v[25], v[27], v[29], v[31]
    )
    return tl.join(low, high)


@triton.jit
def decode_units(units_NU, table, dtype: tl.constexpr):
    """Points [N, 128] in kernel order of the units [N, 4] of a tile; table: what `share_table` returned."""
    if INTERPRETED:
        return _plain_values(units_NU, table, dtype)
    elif dtype == tl.bfloat16:
        return _asm_values(units_NU, table, BF16_ASM, BF16_32)
    else:
        return _asm_values(units_NU, table, FP16_ASM, FP16_32)


@triton.jit
def _asm_values(units_NU, table, asm: tl.constexpr, types: tl.constexpr):
    values = tl.inline_asm_elementwise(asm, VALUES_CONSTRAINTS, [units_NU, table], dtype=types, is_pure=True, pack=1)
    return decoded_order(values)


@triton.jit
def decoded_order(values):
    """[N, 128] in kernel order of what `values_asm` yields for units [N, 4]."""
    rows: tl.constexpr = values[0].shape[0]
    # [N, t, d, e, j, j, h] to [N, j, j, d, t, e, h]
    return _joined32(values).permute(0, 4, 5, 2, 1, 3, 6).reshape(rows, TILE_C)


@triton.jit
def token_tile(values):
    """[M, 128] in kernel order of what `tokens_asm` yields for units [M, 4]."""
    tokens: tl.constexpr = values[0].shape[0]
    # [M, t, j, j, d, e, h] to [M, j, j, d, t, e, h]
    return _joined32(values).permute(0, 2, 3, 4, 1, 5, 6).reshape(tokens, TILE_C)


@triton.jit
def pinned(pointer):
    """An address that nothing is loaded from before this point."""
    if INTERPRETED:
        return pointer
    else:
        return tl.inline_asm_elementwise(
            "mov.b64 $0, $1;", "=l,l", [pointer.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def load_tokens(address_M, tile, dtype: tl.constexpr):
    """Tile number `tile` of tokens [M, 128] in kernel order, from where tokens are, `pinned`, in `token_order`."""
    tokens: tl.constexpr = address_M.shape[0]
    if INTERPRETED:
        x_MT = tl.load(address_M[:, None] + tile * TILE_C + tl.arange(0, TILE_C)[None, :])
        return x_MT.reshape(tokens, UNITS_C, 8, 4).permute(0, 2, 1, 3).reshape(tokens, TILE_C)
    else:
        place = address_M[:, None] + (tile * TILE_C + tl.arange(0, UNITS_C) * 32)[None, :] * 2
        if dtype == tl.bfloat16:
            values = tl.inline_asm_elementwise(
                TOKENS_ASM, TOKENS_CONSTRAINTS, [place], dtype=BF16_32, is_pure=True, pack=1
            )
        else:
            values = tl.inline_asm_elementwise(
                TOKENS_ASM, TOKENS_CONSTRAINTS, [place], dtype=FP16_32, is_pure=True, pack=1
            )
        return token_tile(values)


@triton.jit
def token_order(columns):
    """Where x has its natural columns in memory: in kernel order, but unit by unit, as threads read it."""
    inside = columns % TILE_C
    k, code = inside % 8, inside // 8
    return columns - inside + code // 4 * 32 + k % 4 * 8 + code // 2 % 2 * 4 + code % 2 * 2 + k // 4
