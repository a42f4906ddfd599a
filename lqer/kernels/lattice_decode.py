"""Device functions that turn units of lattice codes into points, in registers (see lattice.py).

On a GPU a unit becomes its 32 values in one piece of PTX. 0x4100 | n << 3 are the bits of the bfloat16 8 + n / 2, 0x4800 |
n << 6 those of the float16; less 11.75 that is the point, exactly. Two values share each instruction. The interpreter
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
    """PTX from a unit, $32, and the table's address, $33, to its values: $(8 c + 2 j + h), coordinate 4 h + j of code c.

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


BF16_ASM = tl.constexpr(values_asm(3, 0x4100, 0xC13C, "bf16x2"))
FP16_ASM = tl.constexpr(values_asm(6, 0x4800, 0xC9E0, "f16x2"))
VALUES_CONSTRAINTS = tl.constexpr(",".join(["=&h"] * 32 + ["l", "r"]))
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
def load_units(units, rows_N, first, tiles: tl.constexpr, span: tl.constexpr):
    """Units [N, 4] of `span` tiles from number `first` on, a tuple."""
    place = unit_places(units, rows_N, first, tiles)
    if INTERPRETED:
        loaded = ()
        for i in tl.static_range(span):
            loaded = loaded + (tl.load(place + i * (ROWS_C * UNITS_C)),)
        return loaded
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
    rows: tl.constexpr = units_NU.shape[0]
    (
        a0, b0, a1, b1, a2, b2, a3, b3, a4, b4, a5, b5, a6, b6, a7, b7,
        a8, b8, a9, b9, a10, b10, a11, b11, a12, b12, a13, b13, a14, b14, a15, b15,
    ) = tl.inline_asm_elementwise(asm, VALUES_CONSTRAINTS, [units_NU, table], dtype=types, is_pure=True, pack=1)  # fmt: skip
    low = _joined16(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    high = _joined16(b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15)
    # [N, t, d, e, j, j, h] to [N, j, j, d, t, e, h]
    return tl.join(low, high).permute(0, 4, 5, 2, 1, 3, 6).reshape(rows, TILE_C)


@triton.jit
def kernel_order(columns):
    """Where natural columns stand in kernel order."""
    inside = columns % TILE_C
    k, code = inside % 8, inside // 8
    return columns - inside + k % 4 * 32 + code // 2 % 2 * 16 + code // 4 * 4 + code % 2 * 2 + k // 4
