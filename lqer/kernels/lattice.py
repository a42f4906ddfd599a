"""E8P weights: eight neighbours of a row share a 16-bit code (lqer.formats.e8 has the codebook), four codes a unit.

A point is σ·a + δ/4 (1, .., 1), its weights odd multiples of a quarter. As four bits n = 2 (value + 15/4) a weight is
exact, and negating all but its δ/4 is n ^ 14. So the eight weights of a code are one word, a nibble for each,

    word = table[row] ^ 14 (signs)                nibble k: coordinate k

where `table` holds the 256 rows of a as they are for σ = 1, first for δ = 1, then for δ = -1. The signs multiply to the
row's own parity: coordinate 7 of a row of odd parity is negated in the table, so that those in the code are even in
number, and seven bits b with

    sign k = b_k ^ b_(k-1),  b_(-1) = b_7 = 0

stand for all eight. The four codes of a unit of 64 bits lie bit-sliced, so that a mask and a product spread the signs
of one:

    bit 9 c and up, 9 bits       row of code c in the table
    bit 36 + 4 k + c, k < 7      b_k of code c

    units    int64 [O/16, tiles, 8, 4, 2]    [.., g, t, h]: unit t, codes 4t .. 4t + 3, of row g + 8 h of a tile's 16

A thread takes units of two rows with one load of 128 bits, and those are what it holds of a tensor core's operand.

Tokens are multiplied as integers: x = step (256 h + l) with h and l of eight bits and a power of two as step, one for
a tile and a token. They lie in memory as bytes [M, 2, I], all h of a token before all l, the columns of a tile in
the order in which threads want them, `token_order`: coordinate 2 j + o of code 4 t + 2 p + e stands at

    32 t + 16 p + 8 o + 4 e + j

since the even coordinates of a word are the low halves of its bytes, and the odd ones the high halves.

Shapes: M tokens, O out_features, I in_features, U units, T columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import E8P, QuantizedTensor
from lqer.formats.e8 import DIMENSION, absolute_rows
from lqer.kernels.layout import ROW_PADDING, ROWS

TILE_K = 128
CODES = TILE_K // DIMENSION  # of a row in a tile
UNITS = CODES // 4
ROW_BITS, ROWS_OF_A, SIGNS_FROM = 9, 512, 36
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
    if isinstance(number_format.block_size, int):
        raise ValueError(f"block_size {number_format.block_size}: kernels read one scale for a row or a tensor (e8p)")


def pack_lattice(weight: QuantizedTensor) -> PackedLattice:
    """Lay out a weight (O, I) in "e8p", vectors along K, without loss.

    Raises ValueError for residual codes, block scales and vectors along the other axis.
    """
    number_format = weight.format
    assert isinstance(number_format, E8P)
    check_lattice(number_format)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"vectors must run along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    layout = LatticeLayout(*weight.shape)
    codes_OV = weight.parts["codes"].to(torch.int64)
    padding = (0, layout.tiles * CODES - codes_OV.shape[1], 0, layout.padded_rows - layout.rows)
    # [groups, h, g, tiles, units, c] to [groups, tiles, g, units, h, c]
    codes = pad(codes_OV, padding).view(layout.padded_rows // ROWS, 2, ROWS // 2, layout.tiles, UNITS, 4)
    codes = codes.permute(0, 3, 2, 4, 1, 5)
    units = _pack_units(codes)
    scales_O = weight.parts["scales"].to(torch.float32).reshape(-1).expand(layout.rows)
    scales = pad(scales_O, (0, layout.padded_rows - layout.rows)).contiguous()
    return PackedLattice(layout, units.contiguous(), rows_table().to(units.device), scales)


def unpack_points(packed: PackedLattice) -> Tensor:
    """The points that a weight's codes stand for, float32 [O, I], by plain torch."""
    layout = packed.layout
    c = torch.arange(4, device=packed.units.device)
    units = packed.units.unsqueeze(-1)
    row = (units >> (ROW_BITS * c)) & (ROWS_OF_A - 1)
    k = torch.arange(DIMENSION, device=c.device)
    b = torch.where(k < 7, units.unsqueeze(-1) >> (SIGNS_FROM + 4 * k + c.unsqueeze(-1)).clamp(max=63), 0) & 1
    sign = b ^ pad(b, (1, -1))
    nibbles = (packed.table.to(torch.int64)[row].unsqueeze(-1) >> (4 * k)) & 15
    values = (nibbles ^ (14 * sign)).to(torch.float32) / 2 - 3.75
    # [groups, tiles, g, units, h, c, k]
    natural = values.permute(0, 4, 2, 1, 3, 5, 6).reshape(layout.padded_rows, -1)
    return natural[: layout.rows, : layout.columns]


def _pack_units(codes_C: Tensor) -> Tensor:
    """int64 [*lead] of four codes of lqer.formats.e8 each, [*lead, 4]."""
    row = ((codes_C >> 7) & 0xFF) | ((codes_C >> 15) << 8)
    c = torch.arange(4, device=codes_C.device)
    unit, b = row << (ROW_BITS * c), torch.zeros_like(codes_C)
    # The sign of coordinate 7 follows from the others.
    for k in range(DIMENSION - 1):
        b = b ^ ((codes_C >> (6 - k)) & 1)
        unit = unit | (b << (SIGNS_FROM + 4 * k + c))
    return unit.sum(-1)


def _signed32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words)


@lru_cache
def rows_table() -> Tensor:
    """int32 [512]: the nibbles of σ·a + δ/4 for σ = 1, first δ = 1, then δ = -1, by row of a.

    Where the digits of a are odd, coordinate 7 is negated, but for its δ/4.
    """
    digits_A8 = torch.tensor(absolute_rows(), dtype=torch.int64)
    n_A8 = digits_A8 * 2 + 9
    n_A8[:, 7] ^= 14 * (digits_A8.sum(-1) & 1)
    words = [((n_A8 - minus) << (4 * torch.arange(DIMENSION))).sum(-1) for minus in (0, 1)]
    return _signed32(torch.cat(words)).to(torch.int32)
