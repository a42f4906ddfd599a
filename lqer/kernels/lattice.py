"""E8P weights: eight neighbours of a row share a 16-bit code, decoded in registers (lqer.formats.e8 has the codebook).

A point is σ·a + δ/4 (1, .., 1), its weights odd multiples of a quarter. As four bits n = 2 (value + 15/4) a weight is
exact, negating it is n ^ 15, and negating all but its δ/4 is n ^ 14. So the eight weights of a code are one word,

    word = row of a ^ 14 (signs) ^ 15 (δ < 0)              a nibble for each coordinate

where `table` holds the 256 rows as they are for σ = 1, δ = 1. The signs multiply to the row's own parity: coordinate 7
of a row of odd parity is negated in the table, so that those in the code are even in number, and seven bits b with

    sign k = b_k ^ b_(k-1),  b_(-1) = b_7 = 0

stand for all eight. Four codes share a 64-bit unit, bit-sliced so that a shift and a mask spread the signs of one:

    byte c of the low half                 row of code c
    bit 4 k + c of the high half, k < 7    b_k of code c
    bit 28 + c of the high half            δ < 0 of code c

    units    int64 [N/16, tiles, 16 rows, 4]       unit t of a row of a tile: codes 2t, 2t + 1, 2t + 8, 2t + 9 of its 16

A decoded tile [N, 128] has its columns in kernel order, 16 * coordinate + code: what the two codes that a thread holds
side by side yield is what tensor cores want side by side. Values are points; scales, one a row, multiply the sums.

Shapes: M tokens, N out_features, K in_features, U units, W words, T columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import E8P, QuantizedTensor
from lqer.formats.e8 import DIMENSION, absolute_rows

from .decode import INTERPRETED, ROWS_C, _code_major, _join4
from .layout import ROW_PADDING, ROWS

TILE_K = 128
CODES = TILE_K // DIMENSION  # of a row in a tile
UNITS = CODES // 4
TILE_C, UNITS_C = tl.constexpr(TILE_K), tl.constexpr(UNITS)
ROW_BITS, ROWS_OF_A, SIGNS_FROM = 9, 512, 36
# Of each coordinate in a word: even nibbles are coordinates 0..3.
NIBBLE = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
# Of a unit's codes, in the order of its bits.
CODE_OF_UNIT = tuple(tuple(range(4 * t, 4 * t + 4)) for t in range(UNITS))
# Tiles that a program reads at once; as many as divide the number of tiles.
SPANS = (16, 8, 4, 2, 1)
# Padding that makes a number of tiles divisible may not take more.
LARGEST_PADDING = 1.05


@dataclass(frozen=True)
class LatticeLayout:
    """What a kernel has to know of such a weight besides its tensors; all of it fixed at compile time."""

    rows: int  # N
    columns: int  # K

    @property
    def tiles(self) -> int:
        needed = -(-self.columns // TILE_K)
        return next(t for span in SPANS if (t := -(-needed // span) * span) <= LARGEST_PADDING * needed)

    @property
    def span(self) -> int:
        """Tiles that a program reads at once."""
        return next(span for span in SPANS if self.tiles % span == 0)

    @property
    def padded_columns(self) -> int:
        return self.tiles * TILE_K

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // ROW_PADDING) * ROW_PADDING


@dataclass(frozen=True)
class PackedLattice:
    """The tensors of one weight in the layout above. scales: float32 [padded rows]."""

    layout: LatticeLayout
    units: Tensor
    table: Tensor
    scales: Tensor

    @property
    def words(self) -> Tensor:
        return self.units

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, None]:
        """In the places of PackedWeight's: units go by the name of words, the table by that of high bits."""
        return self.units, self.table, self.scales, None

    @property
    def nbytes(self) -> int:
        return self.units.nbytes + self.table.nbytes + self.scales.nbytes


def check_lattice(number_format: E8P) -> None:
    """Raise ValueError, stating the rule, for settings that the kernels do not read."""
    if number_format.bits != 2:
        raise ValueError(f"bits {number_format.bits}: kernels read lattice codes of 2 bits (e8p)")
    if number_format.block_size != -1:
        raise ValueError(f"block_size {number_format.block_size}: kernels read one scale for a row or a tensor (e8p)")


def pack_lattice(weight: QuantizedTensor) -> PackedLattice:
    """Lay out a weight (N, K) in "e8p", vectors along K, without loss.

    Raises ValueError for residual codes, block scales and vectors along the other axis.
    """
    number_format = weight.format
    assert isinstance(number_format, E8P)
    check_lattice(number_format)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"vectors must run along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    layout = LatticeLayout(*weight.shape)
    codes_NV = weight.parts["codes"].to(torch.int64)
    padding = (0, layout.tiles * CODES - codes_NV.shape[1], 0, layout.padded_rows - layout.rows)
    codes = pad(codes_NV, padding).view(layout.padded_rows // ROWS, ROWS, layout.tiles, CODES).transpose(1, 2)
    order = torch.tensor(CODE_OF_UNIT, device=codes.device)
    # [groups, tiles, rows, units, c]
    units = _pack_units(codes[..., order])
    scales_N = weight.parts["scales"].to(torch.float32).reshape(-1).expand(layout.rows)
    scales = pad(scales_N, (0, layout.padded_rows - layout.rows)).contiguous()
    return PackedLattice(layout, units.contiguous(), rows_table().to(units.device), scales)


def unpack_points(packed: PackedLattice) -> Tensor:
    """The points that a weight's codes stand for, float32 [N, K], by plain torch."""
    layout = packed.layout
    c = torch.arange(4, device=packed.units.device)
    units = packed.units.unsqueeze(-1)
    row = (units >> (ROW_BITS * c)) & (ROWS_OF_A - 1)
    k = torch.arange(8, device=c.device)
    b = (units.unsqueeze(-1) >> (SIGNS_FROM + 4 * k + c.unsqueeze(-1))) & (k < 7)
    sign = b ^ pad(b, (1, -1))
    nibbles = (packed.table.to(torch.int64)[row].unsqueeze(-1) >> (4 * NIBBLE.to(k))) & 15
    values = (nibbles ^ (14 * sign[..., NIBBLE.to(k)])).to(torch.float32) / 2 - 3.75
    natural = values.flatten(-3, -1)
    return natural.transpose(1, 2).reshape(layout.padded_rows, -1)[: layout.rows, : layout.columns]


def _pack_units(codes_C: Tensor) -> Tensor:
    """int64 [*lead] of four codes of lqer.formats.e8 each, [*lead, 4]."""
    row = ((codes_C >> 7) & 0xFF) | ((codes_C >> 15) << 8)
    # Of the coordinate that a nibble stands for; that of coordinate 7 follows from the others.
    sign = [(codes_C >> (6 - int(NIBBLE.argsort()[p]))) & 1 for p in range(DIMENSION - 1)]
    c = torch.arange(4, device=codes_C.device)
    b = torch.zeros_like(codes_C)
    unit = row << (ROW_BITS * c)
    for p in range(DIMENSION - 1):
        b = b ^ sign[p]
        unit = unit | (b << (SIGNS_FROM + 4 * p + c))
    return unit.sum(-1)


def _signed32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words)


@lru_cache
def rows_table() -> Tensor:
    """int32 [512]: the nibbles of σ·a + δ/4 for σ = 1, first δ = 1, then δ = -1, by row of a.

    Where the digits of a are odd, coordinate 7 is negated, but for its δ/4.
    """
    digits_K8 = torch.tensor(absolute_rows(), dtype=torch.int64)
    n_K8 = digits_K8 * 2 + 9
    n_K8[:, 7] ^= 14 * (digits_K8.sum(-1) & 1)
    words = [((n_K8 - minus) << (4 * NIBBLE)).sum(-1) for minus in (0, 1)]
    return _signed32(torch.cat(words)).to(torch.int32)


# The table in shared memory, filled by all threads of a program once; the result is its address.
SHARE_TABLE = tl.constexpr("""
    {
    .shared .align 2048 .b8 rows_of_a[2048];
    .reg .pred done;
    .reg .b32 i, step, base, address, value;
    .reg .b64 source, offset;
    mov.u32 i, %tid.x;
    mov.u32 step, %ntid.x;
    mov.u32 base, rows_of_a;
    fill:
    setp.ge.u32 done, i, 512;
    @done bra filled;
    mul.wide.u32 offset, i, 4;
    add.s64 source, $1, offset;
    ld.global.nc.b32 value, [source];
    shl.b32 address, i, 2;
    add.s32 address, address, base;
    st.shared.b32 [address], value;
    add.s32 i, i, step;
    bra fill;
    filled:
    bar.sync 0;
    mov.u32 $0, base;
    }
""")


def _words_asm() -> str:
    """PTX: the words of the four codes of a unit; $4 the unit, $5 the table's address."""
    lines = [".reg .b32 low, b, z, t, s, row;", "mov.b64 {low, b}, $4;"]
    lines += ["shr.u32 t, b, 4;", "lop3.b32 z, b, 0xFFFFFFF0, t, 0x6A;"]  # (b & mask) ^ t
    for c in range(4):
        if c == 0:
            lines.append("shl.b32 t, low, 2;")
        elif c < 3:
            lines.append(f"shr.u32 t, low, {9 * c - 2};")
        else:
            lines.append("shf.r.clamp.b32 t, low, b, 25;")
        lines += ["lop3.b32 t, t, 0x7FC, $5, 0xEA;", "ld.shared.b32 row, [t];"]
        if c:
            lines.append(f"shr.u32 s, z, {c};")
        lines += [f"and.b32 s, {'s' if c else 'z'}, 0x11111111;", "mul.lo.u32 s, s, 14;", f"xor.b32 ${c}, row, s;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _values_asm(bits: int, one: int, constant: int, kind: str) -> str:
    """PTX: two words side by side, as the pairs of their nibbles; 8 + n / 2 from bits, then less 11.75, exactly.

    bits: where n / 2 stands in 16 bits. one: 8 in them. constant: -11.75.
    """
    lines = [".reg .b32 lo, hi, t, c;", "prmt.b32 lo, $8, $9, 0x5410;", "prmt.b32 hi, $8, $9, 0x7632;"]
    lines.append(f"mov.b32 c, 0x{constant:04X}{constant:04X};")
    mask = 15 << bits
    for j in range(8):
        source, place = ("lo", 4 * j) if j < 4 else ("hi", 4 * j - 16)
        shift = f"shl.b32 t, {source}, {bits - place};" if place < bits else f"shr.u32 t, {source}, {place - bits};"
        lines += [shift, f"lop3.b32 ${j}, t, 0x{mask:04X}{mask:04X}, 0x{one:04X}{one:04X}, 0xEA;"]
        lines.append(f"add.rn.{kind} ${j}, ${j}, c;")
    return "{\n" + "\n".join(lines) + "\n}"


def _load_asm(span: int) -> str:
    """PTX: a unit of each of `span` tiles from the address of the first."""
    size = 8 * ROWS * UNITS
    return "\n".join(f"ld.global.nc.L1::no_allocate.b64 ${i}, [${span}+{size * i}];" for i in range(span))


def _digits_asm() -> str:
    """PTX: of the four codes of a unit, coordinates 0..3 and 4..7 as four-bit numbers, a byte each.

    $8 the unit and $12 the table's address, each four times over; $0 to $3 coordinates 0..3, $4 to $7 the others.
    """
    lines = [".reg .b32 low, b, z, t, s, row;", "mov.b64 {low, b}, $8;"]
    lines += ["shr.u32 t, b, 4;", "lop3.b32 z, b, 0xFFFFFFF0, t, 0x6A;"]  # (b & mask) ^ t
    for c in range(4):
        if c == 0:
            lines.append("shl.b32 t, low, 2;")
        elif c < 3:
            lines.append(f"shr.u32 t, low, {9 * c - 2};")
        else:
            lines.append("shf.r.clamp.b32 t, low, b, 25;")
        lines += ["lop3.b32 t, t, 0x7FC, $12, 0xEA;", "ld.shared.b32 row, [t];"]
        if c:
            lines.append(f"shr.u32 s, z, {c};")
        lines += [f"and.b32 s, {'s' if c else 'z'}, 0x11111111;", "mul.lo.u32 s, s, 14;", "xor.b32 row, row, s;"]
        lines += [f"and.b32 ${c}, row, 0x0F0F0F0F;", "shr.u32 t, row, 4;", f"and.b32 ${4 + c}, t, 0x0F0F0F0F;"]
    return "{\n" + "\n".join(lines) + "\n}"


DIGITS_ASM = tl.constexpr(_digits_asm())
DIGITS_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["l"] * 4 + ["r"] * 8))
INT8_8 = tl.constexpr((tl.int8,) * 8)
WORDS_ASM = tl.constexpr(_words_asm())
BF16_ASM = tl.constexpr(_values_asm(3, 0x4100, 0xC13C, "bf16x2"))
FP16_ASM = tl.constexpr(_values_asm(6, 0x4800, 0xC9E0, "f16x2"))
VALUES_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 2))
BF16_8 = tl.constexpr((tl.bfloat16,) * 8)
FP16_8 = tl.constexpr((tl.float16,) * 8)
INT_4 = tl.constexpr((tl.int32,) * 4)
LOADS = tl.constexpr(tuple(_load_asm(span) for span in range(17)))
LOAD_CONSTRAINTS = tl.constexpr(tuple(",".join(["=l"] * span + ["l"]) for span in range(17)))
LOAD_TYPES = tl.constexpr(tuple((tl.int64,) * span for span in range(17)))


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
def load_units(units, rows_N, first, tiles: tl.constexpr, span: tl.constexpr):
    """Units [N, 4] of `span` tiles from number `first` on, a tuple."""
    base_N = (rows_N // ROWS_C) * (tiles * ROWS_C * UNITS_C) + (rows_N % ROWS_C) * UNITS_C
    place = units + (base_N + first * (ROWS_C * UNITS_C))[:, None] + tl.arange(0, UNITS_C)[None, :]
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
def _word(table, units_NU, c: tl.constexpr):
    """The word of code c of each unit, in plain operations."""
    row = tl.load(table + ((units_NU >> (9 * c)) & 511).to(tl.int32))
    b = (units_NU >> 32).to(tl.int32)
    z = (b & ~15) ^ ((b >> 4) & 0x0FFFFFFF)
    return row ^ (((z >> c) & 0x11111111) * 14)


@triton.jit
def decode_units(units_NU, table, dtype: tl.constexpr):
    """Points [N, 128] in kernel order of the units [N, 4] of a tile."""
    rows: tl.constexpr = units_NU.shape[0]
    if INTERPRETED:
        w0, w1, w2, w3 = (
            _word(table, units_NU, 0),
            _word(table, units_NU, 1),
            _word(table, units_NU, 2),
            _word(table, units_NU, 3),
        )
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            WORDS_ASM, "=r,=r,=r,=r,l,r", [units_NU, table], dtype=INT_4, is_pure=True, pack=1
        )
    # [N, t, c] to [N, 4 t + c]
    words_NW = _join4(w0, w1, w2, w3).reshape(rows, 16)
    if INTERPRETED:
        j = tl.arange(0, 8)[None, :, None]
        nibbles = (words_NW[:, None, :] >> (4 * j)) & 15
        return (nibbles.to(tl.float32) * 0.5 - 3.75).to(dtype).reshape(rows, TILE_C)
    elif dtype == tl.bfloat16:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            BF16_ASM, VALUES_CONSTRAINTS, [words_NW], dtype=BF16_8, is_pure=True, pack=2
        )
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            FP16_ASM, VALUES_CONSTRAINTS, [words_NW], dtype=FP16_8, is_pure=True, pack=2
        )
    return _code_major(tl.join(_join4(v0, v2, v4, v6), _join4(v1, v3, v5, v7)))


@triton.jit
def decode_numbers(units_NU, table):
    """int8 [N, 128], n = 2 (value + 15/4) of the units [N, 4] of a tile."""
    rows: tl.constexpr = units_NU.shape[0]
    wide = units_NU[:, :, None].broadcast_to(rows, UNITS_C, 4)
    # What differs from byte to byte, for the compiler: it would else compute one of them for all.
    byte = tl.arange(0, 4)[None, None, :].broadcast_to(rows, UNITS_C, 4)
    e0, e1, e2, e3, o0, o1, o2, o3 = tl.inline_asm_elementwise(
        DIGITS_ASM, DIGITS_CONSTRAINTS, [wide, table, byte], dtype=INT8_8, is_pure=True, pack=4
    )
    # [N, t, i, c, c, half]
    joined = tl.join(_join4(e0, e1, e2, e3), _join4(o0, o1, o2, o3))
    return joined.permute(0, 3, 4, 1, 5, 2).reshape(rows, TILE_C)


LOAD_X = tl.constexpr("ld.global.v4.b32 {$0,$1,$2,$3}, [$8]; ld.global.v4.b32 {$4,$5,$6,$7}, [$8+16];")
LOAD_X_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["l"] * 8 + ["r"] * 8))
INT8_4 = tl.constexpr((tl.int8,) * 4)


@triton.jit
def pinned(pointer):
    """An address that nothing is loaded from before this point."""
    return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [pointer.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def load_digits(address_C):
    """int8 [C, 128] in kernel order of the 128 digits at each address."""
    columns: tl.constexpr = address_C.shape[0]
    place = address_C[:, None, None] + (tl.arange(0, 4) * 32)[None, :, None]
    wide = place.broadcast_to(columns, 4, 8)
    byte = tl.arange(0, 8)[None, None, :].broadcast_to(columns, 4, 8)
    x0, x1, x2, x3 = tl.inline_asm_elementwise(
        LOAD_X, LOAD_X_CONSTRAINTS, [wide, byte], dtype=INT8_4, is_pure=True, pack=8
    )
    # [C, t, b, q, q]
    return _join4(x0, x1, x2, x3).permute(0, 3, 4, 1, 2).reshape(columns, TILE_C)
