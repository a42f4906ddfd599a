"""Memory layout of integers with a floating-point scale per group ("int"): a thread's codes are tensor core operands.

A strip is 16 rows by 256 columns and belongs to one warp. It is cut into 8 steps of 32 columns. Lane 4 g + t holds of
each step columns 8 t to 8 t + 7 of rows g and g + 8: four pairs of neighbours, each a register of a tensor core operand
once decoded. A register is one shift and one `lop3` away from its word, because the even column of a pair lies in the
low half of a word and the odd one at the same place of the high half. The 16 pairs of a row in 128 columns take k words
for k bits, in the places that `places` lists:

    2, 4 bits    consecutive fields of the halves
    3 bits       five fields in either half of each word; the last pair takes bit 15 of the halves of all three
    8 bits       as 4 bits, the low digits in words 0 to 3, the high ones in words 4 to 7

A lane has 4 k words of a strip (of its first 128 columns, of row g, first) and loads four at once:

    words    int32 [OP/16, strips, k, 32, 4]     [.., p, lane, j]: word 4 p + j of a lane
    scales         [OP/16, units, 8, P, 2]       [.., g, p, h]: of row g + 8 h and group p of a strip; 16 bits
    zeros    uint8 like scales                   asymmetric only

P is the number of groups in a strip. If groups are longer than a strip, it is one, and a unit is the strips of a group;
otherwise a unit is a strip. Rows are padded to a multiple of 64 and columns to whole strips, with scales of 0.

Shapes: O out_features, I in_features, P padded (OP), G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import Int, NumberFormat, QuantizedTensor
from lqer.kernels.layout.codes import ROW_PADDING, ROWS

STRIP = 256
LANES = 32
PAIRS = 16  # of a row in half a strip
BITS = (2, 3, 4, 8)
SMALLEST_GROUP = 32  # columns of a step
SCALE_DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Place:
    """Where `width` bits of a code lie: from `bit` of a half of `word`; they are the code's bits from `shift` on."""

    word: int
    bit: int
    width: int
    shift: int = 0


@triton.constexpr_function
def places(bits: int, pair: int) -> tuple[Place, ...]:
    """Where the bits of pair number `pair` of the 16 of a row in half a strip lie."""
    if bits == 3:
        if pair == PAIRS - 1:
            return tuple(Place(n, 15, 1, n) for n in range(3))
        return (Place(pair // 5, 3 * (pair % 5), 3),)
    digit = min(bits, 4)
    word, field = divmod(pair * digit, 16)
    return tuple(Place(word + shift, field, digit, shift) for shift in range(0, bits, digit))


@dataclass(frozen=True)
class GroupLayout:
    """All that describes such a weight besides its tensors."""

    rows: int
    columns: int
    bits: int
    group: int  # a power of two; at least `columns` for one scale per row
    symmetric: bool
    bfloat: bool  # scales are bfloat16, else float16

    @cached_property
    def compiled(self) -> GroupLayout:
        """The layout without the number of rows: kernels are compiled once for all of these."""
        return replace(self, rows=0)

    @property
    def strips(self) -> int:
        return -(-self.columns // STRIP)

    @property
    def padded_columns(self) -> int:
        return self.strips * STRIP

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // ROW_PADDING) * ROW_PADDING

    @property
    def groups(self) -> int:
        """Groups of a strip, P."""
        return max(1, STRIP // self.group)

    @property
    def strips_per_unit(self) -> int:
        return max(1, self.group // STRIP)

    @property
    def units(self) -> int:
        return -(-self.strips // self.strips_per_unit)

    @property
    def offset(self) -> int:
        """The zero point of symmetric codes, which are stored unsigned."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class PackedGroups:
    """The tensors of one weight in the layout above; zeros is None if it is symmetric."""

    layout: GroupLayout
    words: Tensor
    scales: Tensor
    zeros: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, None, Tensor, Tensor | None]:
        """In the order of PackedWeight.parts."""
        return self.words, None, self.scales, self.zeros

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)


def fits_groups(number_format: NumberFormat) -> bool:
    """Whether this layout holds such a weight: integers of 2, 3, 4 or 8 bits, groups of at least 32, 16-bit scales."""
    if not isinstance(number_format, Int) or number_format.bits not in BITS:
        return False
    block = number_format.block_size
    long = block == "row" or (isinstance(block, int) and block >= SMALLEST_GROUP and block & (block - 1) == 0)
    return long and number_format.scale_dtype in SCALE_DTYPES


def pack_groups(weight: QuantizedTensor) -> PackedGroups:
    """Pack a weight [O, I] for which `fits_groups`, with groups along axis 1, without loss.

    Raises ValueError for groups along axis 0.
    """
    number_format = weight.format
    assert isinstance(number_format, Int)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"blocks must be along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    rows, columns = weight.shape
    block = number_format.block_size
    whole = isinstance(block, str) or block >= columns
    group = max(SMALLEST_GROUP, 1 << (columns - 1).bit_length()) if whole else int(block)
    bfloat = number_format.scale_dtype == "bfloat16"
    layout = GroupLayout(rows, columns, number_format.bits, group, number_format.symmetric, bfloat)
    words = _pack_codes(weight.parts["codes"], layout)
    scales = _arrange(weight.parts["scales"], layout)
    zeros = None if layout.symmetric else _arrange(weight.parts["zeros"], layout)
    return PackedGroups(layout, words, scales, zeros)


def _pack_codes(codes_OI: Tensor, layout: GroupLayout) -> Tensor:
    padding = (0, layout.padded_columns - layout.columns, 0, layout.padded_rows - layout.rows)
    unsigned = pad(codes_OI.to(torch.int16), padding) + (layout.offset if layout.symmetric else 0)
    # rows: row group, h, g; columns: strip, half, step, t, pair of the step, odd
    codes = unsigned.view(-1, 2, 8, layout.strips, 2, 4, 4, 4, 2).permute(0, 3, 2, 6, 4, 1, 5, 7, 8)
    # [OP/16, strips, g, t, half, h, pair, odd]
    codes = codes.reshape(-1, layout.strips, 8, 4, 2, 2, PAIRS, 2)
    words = torch.zeros((*codes.shape[:-2], layout.bits), dtype=torch.int64, device=codes.device)
    for pair in range(PAIRS):
        for place in places(layout.bits, pair):
            bits = codes[..., pair, :].to(torch.int64) >> place.shift & (1 << place.width) - 1
            words[..., place.word] |= bits[..., 0] << place.bit | bits[..., 1] << place.bit + 16
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.view(-1, layout.strips, LANES, layout.bits, 4).transpose(2, 3).contiguous()


def _arrange(scales_OG: Tensor, layout: GroupLayout) -> Tensor:
    """Scales [O, G] to [OP/16, units, 8, P, 2], padded with zeros."""
    padding = (0, layout.units * layout.groups - scales_OG.shape[1], 0, layout.padded_rows - layout.rows)
    scales = pad(scales_OG, padding).view(-1, 2, ROWS // 2, layout.units, layout.groups)
    return scales.permute(0, 3, 2, 4, 1).contiguous()


def unpack_groups(packed: PackedGroups) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [O, I] int16, scales [O, G] as stored, and zero points [O, G] int16."""
    layout = packed.layout
    words = packed.words.transpose(2, 3).reshape(-1, layout.strips, 8, 4, 2, 2, layout.bits)
    codes = torch.zeros((*words.shape[:-1], PAIRS, 2), dtype=torch.int16, device=words.device)
    for pair in range(PAIRS):
        for place in places(layout.bits, pair):
            for odd in range(2):
                bits = words[..., place.word] >> place.bit + 16 * odd & (1 << place.width) - 1
                codes[..., pair, odd] |= (bits << place.shift).to(torch.int16)
    codes = codes.unflatten(-2, (4, 4)).permute(0, 5, 2, 1, 4, 6, 3, 7, 8)
    codes_OI = codes.reshape(layout.padded_rows, -1)[: layout.rows, : layout.columns]
    scales_OG = _in_rows(packed.scales, layout)
    if packed.zeros is None:
        return codes_OI, scales_OG, torch.full(scales_OG.shape, layout.offset, dtype=torch.int16, device=words.device)
    return codes_OI, scales_OG, _in_rows(packed.zeros, layout).to(torch.int16)


def _in_rows(scales: Tensor, layout: GroupLayout) -> Tensor:
    """Scales or zeros of the layout to [O, G]."""
    return scales.permute(0, 4, 2, 1, 3).reshape(layout.padded_rows, -1)[: layout.rows]
