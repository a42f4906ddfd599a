"""How a quantized weight lies in memory for the kernels: 16-row groups of K tiles, one contiguous chunk each.

A 32-bit word holds `per_word` codes of one row, offset binary, code j in bits j*width and up. Sixteen words of a row
are eight pairs, a pair holds 2 * per_word neighbours along K, even ones in its first word, odd ones in its second:

    k = tile * tile_k + pair * 2 * per_word + 2 * j + odd          word = 2 * pair + odd,  tile_k = 16 * per_word

So two words that a thread holds side by side yield, code by code, the neighbours that a tensor core operand wants in
one register, and a pair shares its scale. Three-bit codes are a two-bit word plane and a plane of their high bits, one
word a pair, bit 16 * odd + j. Widths 5 to 7 take bytes.

    words    int32  [O/16, I/tile_k, 16 rows, 16]
    high     int32  [O/16, I/tile_k, 16 rows, 8]        three bits only
    scales          [O/16, tiles, 16 rows, per_tile]    MXINT: uint8, biased exponents of the blocks' steps; int: scales
    zeros    uint8  like scales                         asymmetric int only

Scales of blocks shorter than a pair come sub-block by sub-block: all first halves of the eight pairs, then all second
ones. For blocks longer than a tile there is one entry a block. N is padded to 64 rows and K to whole tiles with zeros.

Shapes: O out_features, I in_features, padded where marked with P.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import Int, MXInt, NumberFormat, QuantizedTensor

ROWS = 16  # of a group
WORDS = 16  # of a row in a tile
PAIRS = WORDS // 2
ROW_PADDING = 64  # the smallest tile of rows that a kernel takes

# The step's exponent e of an MXINT block must satisfy these for (128 + u) * 2^e - 136 * 2^e to be exact in bfloat16.
SMALLEST_STEP, LARGEST_STEP = 1, 127 + 119


@dataclass(frozen=True)
class RowLayout:
    """How the codes and scales of rows lie in tiles: kernels are compiled for this, whatever the number of rows."""

    columns: int  # K
    bits: int
    offset: int  # what was added to a code to make it unsigned
    block: int  # elements that share a scale; a power of two, at least as large as K for one scale per row
    exponents: bool  # scales are exponents of MXINT steps

    @property
    def width(self) -> int:
        """Bits that a code takes in a word."""
        return {2: 2, 3: 2, 4: 4}.get(self.bits, 8)

    @property
    def per_word(self) -> int:
        return 32 // self.width

    @property
    def tile_k(self) -> int:
        return WORDS * self.per_word

    @property
    def tiles(self) -> int:
        return -(-self.columns // self.tile_k)

    @property
    def padded_columns(self) -> int:
        return self.tiles * self.tile_k

    @property
    def halves(self) -> int:
        """Blocks in a pair of words."""
        return max(1, 2 * self.per_word // self.block)

    @property
    def scales_per_tile(self) -> int:
        return max(1, self.tile_k // self.block)

    @property
    def tiles_per_unit(self) -> int:
        """Tiles that share a scale where blocks are longer than a tile."""
        return max(1, self.block // self.tile_k)

    @property
    def units(self) -> int:
        return -(-self.tiles // self.tiles_per_unit)


@dataclass(frozen=True)
class Layout(RowLayout):
    """What a kernel has to know of a packed weight besides its tensors."""

    rows: int  # N

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // ROW_PADDING) * ROW_PADDING

    @cached_property
    def compiled(self) -> RowLayout:
        """All but the number of rows."""
        return RowLayout(self.columns, self.bits, self.offset, self.block, self.exponents)


@dataclass(frozen=True)
class PackedWeight:
    """The tensors of one weight in the layout above; `high` and `zeros` may be None."""

    layout: Layout
    words: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return self.words, self.high, self.scales, self.zeros

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)


def check_weight_format(number_format: NumberFormat) -> None:
    """Raise ValueError, stating the rule, for a format that the kernels do not read."""
    kind, block = number_format.kind, number_format.block_size
    if not isinstance(number_format, MXInt | Int):
        raise ValueError(f'kernels read weights of kind "mxint", "int", "codebook" and "e8p", found "{kind}"')
    if block == "tensor" or (isinstance(block, int) and (block < 16 or block & (block - 1))):
        raise ValueError(f'block_size {block!r} is neither "row" nor a power of two of at least 16 ({kind})')


def pack_weight(weight: QuantizedTensor) -> PackedWeight:
    """Lay out a weight [O, I] with blocks along K (axis 1), without loss.

    Raises ValueError for a format that the kernels do not read, blocks along the other axis, or an MXINT block whose
    step lies outside 2^-126..2^119.
    """
    check_weight_format(weight.format)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"blocks must run along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    layout = _layout(weight)
    words, high = _pack_codes(weight.parts["codes"], layout)
    if isinstance(weight.format, MXInt):
        return PackedWeight(layout, words, high, _arrange(_step_exponents(weight), layout), None)
    assert isinstance(weight.format, Int)
    scales = _arrange(weight.parts["scales"], layout)
    zeros = None if weight.format.symmetric else _arrange(weight.parts["zeros"], layout)
    return PackedWeight(layout, words, high, scales, zeros)


def unpack_codes(packed: PackedWeight) -> Tensor:
    """The inverse of what `pack_weight` does to the codes: int16 [O, I], the offset taken off again."""
    layout = packed.layout
    shifts_J = torch.arange(layout.per_word, device=packed.words.device) * layout.width
    # [groups, tiles, rows, pairs, odd, 1] >> [J]
    words = packed.words.view(*packed.words.shape[:-1], PAIRS, 2, 1)
    codes = (words >> shifts_J) & ((1 << layout.width) - 1)
    if packed.high is not None:
        bit = 16 * torch.arange(2, device=words.device)[:, None] + torch.arange(layout.per_word, device=words.device)
        codes |= ((packed.high[..., None, None] >> bit) & 1) << 2
    codes_OI = codes.permute(0, 2, 1, 3, 5, 4).reshape(layout.padded_rows, -1)
    return (codes_OI[: layout.rows, : layout.columns] - layout.offset).to(torch.int16)


def _layout(weight: QuantizedTensor) -> Layout:
    number_format, (rows, columns) = weight.format, weight.shape
    assert isinstance(number_format, MXInt | Int)
    block = number_format.block_size
    if isinstance(block, str) or block >= columns:
        block = 1 << max(4, (columns - 1).bit_length())
    exponents = isinstance(number_format, MXInt)
    return Layout(columns, number_format.bits, number_format.code_offset, block, exponents, rows)


def _pack_codes(codes_OI: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    padding = (0, layout.padded_columns - layout.columns, 0, layout.padded_rows - layout.rows)
    unsigned = pad(codes_OI.to(torch.int32), padding) + layout.offset
    shape = (layout.padded_rows // ROWS, ROWS, layout.tiles, PAIRS, layout.per_word, 2)
    # [groups, tiles, rows, pairs, odd, J]
    codes = unsigned.view(shape).permute(0, 2, 1, 3, 5, 4)
    high = None
    if layout.bits == 3:
        places = 16 * torch.arange(2, device=codes.device)[:, None] + torch.arange(16, device=codes.device)
        high = _as_int32(((codes >> 2).to(torch.int64) << places).sum((-1, -2)))
        codes = codes & 3
    shifts_J = torch.arange(layout.per_word, device=codes.device) * layout.width
    words = _as_int32((codes.to(torch.int64) << shifts_J).sum(-1))
    return words.flatten(-2).contiguous(), high


def _as_int32(words: Tensor) -> Tensor:
    """Unsigned 32-bit values in int64 to the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _step_exponents(weight: QuantizedTensor) -> Tensor:
    """uint8 [O, blocks]: the biased exponent of each block's step, 0 for a block of zeros."""
    assert isinstance(weight.format, MXInt)
    exponents = weight.parts["exponents"].to(torch.int16)
    steps = exponents - weight.format.fraction_bits
    outside = (exponents > 0) & ((steps < SMALLEST_STEP) | (steps > LARGEST_STEP))
    if outside.any():
        found = int(steps[outside][0]) - 127
        raise ValueError(f"the step 2^{found} of an MXINT block is not in 2^-126..2^119, where kernels are exact")
    return torch.where(exponents > 0, steps, 0).to(torch.uint8)


def _arrange(scales_OB: Tensor, layout: Layout) -> Tensor:
    """Scales of all blocks [O, blocks] to [O/16, tiles, 16, per_tile], padded with zeros."""
    per_tile = layout.scales_per_tile
    tiles = layout.tiles if layout.block <= layout.tile_k else scales_OB.shape[1]
    padding = (0, tiles * per_tile - scales_OB.shape[1], 0, layout.padded_rows - layout.rows)
    scales = pad(scales_OB, padding).view(layout.padded_rows // ROWS, ROWS, tiles, per_tile)
    if layout.halves > 1:
        scales = scales.unflatten(-1, (PAIRS, layout.halves)).transpose(-1, -2).flatten(-2)
    return scales.transpose(1, 2).contiguous()
