"""Memory layout of integer codes ("mxint", and "int" that groups.py does not hold): tiles of 16 rows along K.

A 32-bit word holds `per_word` codes of one row in offset binary, code j from bit j * width upwards. The sixteen words
of a row in a tile form eight pairs. A pair holds 2 * per_word adjacent columns, the even ones in its first word, the
odd ones in its second:

    k = tile * tile_k + pair * 2 * per_word + 2 * j + odd          word = 2 * pair + odd,  tile_k = 16 * per_word

Two consecutive words of a thread therefore decode, code by code, into the adjacent columns that a tensor core operand
expects in one register, and a pair shares its scale. Three-bit codes are stored as a plane of two-bit codes and a plane
of high bits, one word per pair, at bit 16 * odd + j. Codes of 5 to 7 bits are stored in bytes.

    words    int32  [OP/16, tiles, 16 rows, 16]
    high     int32  [OP/16, tiles, 16 rows, 8]           three bits only
    scales          [OP/16, units, 16 rows, per_tile]    MXINT: uint8 biased exponents of the blocks' steps; int: scales
    zeros    uint8  like scales                          asymmetric int only

If blocks are shorter than a pair, the scales of the first halves of all eight pairs come first, then those of the
second halves. If blocks are longer than a tile, a unit is the tiles of one block and has one scale; otherwise a unit is
a tile. Rows are padded to a multiple of 64 and columns to whole tiles, with codes of 0 and scales of 0.

Shapes: O out_features, I in_features, P padded (OP), B quantization blocks of a row, J codes of a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import Int, MXInt, NumberFormat, QuantizedTensor

ROWS = 16  # of a tile
WORDS = 16  # of a row in a tile
PAIRS = WORDS // 2
ROW_PADDING = 64  # the fewest rows that a program computes

# Limits of a step 2^(e - 127) for (128 + u) * step - 136 * step to be exact in bfloat16, and for what decoding of
# mid-rise levels computes (decode.py).
SMALLEST_STEP, LARGEST_STEP = 1, 127 + 119


@dataclass(frozen=True)
class RowLayout:
    """Layout of codes and scales, without the number of rows: kernels are compiled once for each RowLayout."""

    columns: int
    bits: int
    offset: int  # added to a code to make it unsigned
    block: int  # elements that share a scale, a power of two; at least `columns` for one scale per row
    exponents: bool  # scales are stored as exponents (MXINT)
    mid_rise: bool  # a signed code k stands for k + 1/2 (MXINT)

    @property
    def width(self) -> int:
        """Bits of a code in a word."""
        return {2: 2, 3: 2, 4: 4}.get(self.bits, 8)

    @property
    def origin(self) -> float:
        """What is subtracted from an unsigned code to give the value in steps."""
        return self.offset - 0.5 if self.mid_rise else self.offset

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
        """Blocks that the columns of a pair belong to: 1 or 2."""
        return max(1, 2 * self.per_word // self.block)

    @property
    def scales_per_tile(self) -> int:
        return max(1, self.tile_k // self.block)

    @property
    def tiles_per_unit(self) -> int:
        """Tiles of a block, if it is longer than a tile."""
        return max(1, self.block // self.tile_k)

    @property
    def units(self) -> int:
        return -(-self.tiles // self.tiles_per_unit)


@dataclass(frozen=True)
class Layout(RowLayout):
    """All that describes a packed weight besides its tensors."""

    rows: int

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // ROW_PADDING) * ROW_PADDING

    @cached_property
    def compiled(self) -> RowLayout:
        """The layout without the number of rows."""
        return RowLayout(self.columns, self.bits, self.offset, self.block, self.exponents, self.mid_rise)


@dataclass(frozen=True)
class PackedWeight:
    """The tensors of one weight in the layout above; high and zeros may be None."""

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
    """Raise ValueError, with the rule, for a format that the kernels do not support."""
    kind, block = number_format.kind, number_format.block_size
    if not isinstance(number_format, MXInt | Int):
        raise ValueError(
            f'kernels support weights of kind "mxint", "int", "codebook", "e8p" and "trellis", found "{kind}"'
        )
    if block == "tensor" or (isinstance(block, int) and (block < 16 or block & (block - 1))):
        raise ValueError(f'block_size {block!r} is neither "row" nor a power of two of at least 16 ({kind})')


def pack_weight(weight: QuantizedTensor) -> PackedWeight:
    """Pack a weight [O, I] with blocks along axis 1, without loss.

    Raises ValueError for an unsupported format, blocks along axis 0, or an MXINT step outside 2^-126..2^119.
    """
    check_weight_format(weight.format)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"blocks must be along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    layout = _layout(weight)
    words, high = _pack_codes(weight.parts["codes"], layout)
    if isinstance(weight.format, MXInt):
        return PackedWeight(layout, words, high, _arrange(_step_exponents(weight), layout), None)
    assert isinstance(weight.format, Int)
    scales = _arrange(weight.parts["scales"], layout)
    zeros = None if weight.format.symmetric else _arrange(weight.parts["zeros"], layout)
    return PackedWeight(layout, words, high, scales, zeros)


def unpack_codes(packed: PackedWeight) -> Tensor:
    """The signed codes of a packed weight, int16 [O, I]."""
    layout = packed.layout
    shifts_J = torch.arange(layout.per_word, device=packed.words.device) * layout.width
    # [OP/16, tiles, rows, pairs, odd, 1] >> [J]
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
    mid_rise = isinstance(number_format, MXInt) and number_format.mid_rise
    return Layout(columns, number_format.bits, number_format.code_offset, block, exponents, mid_rise, rows)


def _pack_codes(codes_OI: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    padding = (0, layout.padded_columns - layout.columns, 0, layout.padded_rows - layout.rows)
    unsigned = pad(codes_OI.to(torch.int32), padding) + layout.offset
    shape = (layout.padded_rows // ROWS, ROWS, layout.tiles, PAIRS, layout.per_word, 2)
    # [OP/16, tiles, rows, pairs, odd, J]
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
    """Unsigned 32-bit values in int64 to int32 with the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _step_exponents(weight: QuantizedTensor) -> Tensor:
    """uint8 [O, B]: the biased exponent of each block's step, 0 for a block of zeros."""
    assert isinstance(weight.format, MXInt)
    exponents = weight.parts["exponents"].to(torch.int16)
    steps = exponents - weight.format.fraction_bits
    outside = (exponents > 0) & ((steps < SMALLEST_STEP) | (steps > LARGEST_STEP))
    if outside.any():
        found = int(steps[outside][0]) - 127
        raise ValueError(f"the step 2^{found} of an MXINT block is outside 2^-126..2^119, where kernels are exact")
    return torch.where(exponents > 0, steps, 0).to(torch.uint8)


def _arrange(scales_OB: Tensor, layout: Layout) -> Tensor:
    """Scales [O, B] to [OP/16, units, 16, per_tile], padded with zeros."""
    per_tile = layout.scales_per_tile
    tiles = layout.tiles if layout.block <= layout.tile_k else scales_OB.shape[1]
    padding = (0, tiles * per_tile - scales_OB.shape[1], 0, layout.padded_rows - layout.rows)
    scales = pad(scales_OB, padding).view(layout.padded_rows // ROWS, ROWS, tiles, per_tile)
    if layout.halves > 1:
        scales = scales.unflatten(-1, (PAIRS, layout.halves)).transpose(-1, -2).flatten(-2)
    return scales.transpose(1, 2).contiguous()
