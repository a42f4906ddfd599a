"""Memory layout of E8P weights: eight adjacent weights are one 16-bit code (lqer.formats.e8), four codes a unit.

A lattice point is σ·a + δ/4 (1, .., 1): its coordinates are odd multiples of 1/4. The four bits n = 2 (value + 15/4)
represent a coordinate exactly, and changing the sign of all but its δ/4 is n ^ 14. The eight weights of a code are
therefore one word with a nibble per weight,

    word = table[row] ^ 14 (signs)                nibble k: coordinate k

where `table` holds the 256 rows of a with σ = 1, first for δ = 1, then for δ = -1. The product of a code's signs is the
parity of its row. Coordinate 7 of rows with odd parity is negated in the table, so that the number of negative signs in
a code is even, and seven bits b represent all eight signs:

    sign k = b_k ^ b_(k-1),  b_(-1) = b_7 = 0

The four codes of a 64-bit unit are bit-sliced, so that a mask and a multiplication spread the signs of one code:

    bit 9 c and up, 9 bits       row of code c in the table
    bit 36 + 4 k + c, k < 7      b_k of code c

    units    int64 [OP/16, tiles, 8, 4, 2]    [.., g, t, h]: unit t, codes 4t .. 4t + 3, of row g + 8 h of a tile's 16

A thread loads the units of two rows with one 128-bit load; they are its part of a tensor core operand.

Tokens are multiplied as integers: x = step (256 h + l), with 8-bit h and l and one power of two as step per tile and
token. They are stored as bytes [M, 2, IP], all h of a token before all l. Within a tile columns are in the order in
which threads read them (`token_order`): coordinate 2 j + o of code 4 t + 2 p + e is at

    32 t + 16 p + 8 o + 4 e + j

because the even coordinates of a word are the low halves of its bytes, and the odd ones the high halves.

Shapes: O out_features, I in_features, V codes of a row, A rows of the table a, C the four codes of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import E8P, QuantizedTensor
from lqer.formats.e8 import DIMENSION, absolute_rows
from lqer.kernels.layout.codes import ROWS
from lqer.kernels.layout.tiles import TILE_K, TiledLayout

CODES = TILE_K // DIMENSION  # of a row in a tile
UNITS = CODES // 4
ROW_BITS, ROWS_OF_A, SIGNS_FROM = 9, 512, 36


@dataclass(frozen=True)
class LatticeLayout(TiledLayout):
    """All that describes such a weight besides its tensors."""


@dataclass(frozen=True)
class PackedLattice:
    """The tensors of one weight in the layout above.

    units: int64 [OP/16, tiles, 8, 4, 2]. table: int32 [512]. scales: float32 [OP].
    """

    layout: LatticeLayout
    units: Tensor
    table: Tensor
    scales: Tensor

    @property
    def words(self) -> Tensor:
        return self.units

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, None]:
        """In the order of PackedWeight.parts: units take the place of words, the table that of the high bits."""
        return self.units, self.table, self.scales, None

    @property
    def nbytes(self) -> int:
        return self.units.nbytes + self.table.nbytes + self.scales.nbytes


def check_lattice(number_format: E8P) -> None:
    """Raise ValueError, with the rule, for settings that the kernels do not support."""
    if number_format.bits != 2:
        raise ValueError(f"bits {number_format.bits}: kernels support lattice codes of 2 bits only (e8p)")
    if isinstance(number_format.block_size, int):
        raise ValueError(
            f"block_size {number_format.block_size}: kernels support one scale per row or per tensor only (e8p)"
        )


def pack_lattice(weight: QuantizedTensor) -> PackedLattice:
    """Pack an "e8p" weight [O, I] with vectors along axis 1, without loss.

    Raises ValueError for residual codes, block scales and vectors along axis 0.
    """
    number_format = weight.format
    assert isinstance(number_format, E8P)
    check_lattice(number_format)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"vectors must be along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    layout = LatticeLayout(*weight.shape)
    codes_OV = weight.parts["codes"].to(torch.int64)
    padding = (0, layout.tiles * CODES - codes_OV.shape[1], 0, layout.padded_rows - layout.rows)
    # [OP/16, h, g, tiles, units, c] to [OP/16, tiles, g, units, h, c]
    codes = pad(codes_OV, padding).view(layout.padded_rows // ROWS, 2, ROWS // 2, layout.tiles, UNITS, 4)
    codes = codes.permute(0, 3, 2, 4, 1, 5)
    units = _pack_units(codes)
    scales_O = weight.parts["scales"].to(torch.float32).reshape(-1).expand(layout.rows)
    scales = pad(scales_O, (0, layout.padded_rows - layout.rows)).contiguous()
    return PackedLattice(layout, units.contiguous(), rows_table().to(units.device), scales)


def unpack_points(packed: PackedLattice) -> Tensor:
    """The lattice points of a weight's codes, float32 [O, I], unscaled."""
    layout = packed.layout
    c = torch.arange(4, device=packed.units.device)
    units = packed.units.unsqueeze(-1)
    row = (units >> (ROW_BITS * c)) & (ROWS_OF_A - 1)
    k = torch.arange(DIMENSION, device=c.device)
    b = torch.where(k < 7, units.unsqueeze(-1) >> (SIGNS_FROM + 4 * k + c.unsqueeze(-1)).clamp(max=63), 0) & 1
    sign = b ^ pad(b, (1, -1))
    nibbles = (packed.table.to(torch.int64)[row].unsqueeze(-1) >> (4 * k)) & 15
    values = (nibbles ^ (14 * sign)).to(torch.float32) / 2 - 3.75
    # [OP/16, tiles, g, units, h, c, k]
    natural = values.permute(0, 4, 2, 1, 3, 5, 6).reshape(layout.padded_rows, -1)
    return natural[: layout.rows, : layout.columns]


def _pack_units(codes_C: Tensor) -> Tensor:
    """Codes of lqer.formats.e8 [.., 4] to units, int64 [..]."""
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
    """int32 [512]: the nibbles of σ·a + δ/4 with σ = 1, for each row of a, first δ = 1, then δ = -1.

    If the sum of a row's digits is odd, coordinate 7 is negated, except its δ/4.
    """
    digits_A8 = torch.tensor(absolute_rows(), dtype=torch.int64)
    n_A8 = digits_A8 * 2 + 9
    n_A8[:, 7] ^= 14 * (digits_A8.sum(-1) & 1)
    words = [((n_A8 - minus) << (4 * torch.arange(DIMENSION))).sum(-1) for minus in (0, 1)]
    return _signed32(torch.cat(words)).to(torch.int32)
