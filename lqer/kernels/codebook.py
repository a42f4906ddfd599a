"""Weights of learned codebooks: D neighbours of a row share an index into a table of their group.

    words    int32 [quads of rows, W, 4]              indices of four rows, W words each
    table    [row groups, column groups, 2^b, D]      centroids, as the values that they stand for

What a thread looks up at once is a unit: one index, or two neighbours' where D is 1, and so two or four columns. An
index takes 1, 2, 4 or 8 bits, the smallest number that is enough. The units of every group of columns begin with a
word of their own, and field j of word w of the group is unit j * (words of a group) + w: threads that hold words side
by side meet activations side by side, and so do the values that they decode. Four rows lie together because a thread
that reads 16 bytes holds a word of each, and multiplies all of them by the activations that it has read once.

Shapes: O out_features, I in_features, V indices of a row, G groups of columns, U units, J fields of a word, W words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import Codebook, QuantizedTensor

FIELD_BITS = (1, 2, 4, 8)
QUAD = 4  # rows that lie together
MADE_PAIRS = 16  # tables of single values become tables of so many pairs, at most, on their way into shared memory
THREADS = 128
LONG_TABLE = 128  # entries: more rows of a program share it
MOST_ENTRIES = 2048  # in shared memory at once


@dataclass(frozen=True)
class IndexLayout:
    """How the indices and tables of rows lie: kernels are compiled for this, whatever the number of rows."""

    columns: int  # K
    dimension: int
    index_bits: int
    group_rows: int
    group_columns: int

    @property
    def field(self) -> int:
        """Bits that an index takes in a word."""
        return next(bits for bits in FIELD_BITS if bits >= self.index_bits)

    @property
    def unit(self) -> int:
        """Columns of a unit."""
        return max(2, self.dimension)

    @property
    def unit_bits(self) -> int:
        return self.field * (self.unit // self.dimension)

    @property
    def per_word(self) -> int:
        """Units of a word."""
        return 32 // self.unit_bits

    @property
    def entries(self) -> int:
        """Of a group's table as kernels stage it: pairs of values where those are few, else centroids."""
        pairs: int = 1 << self.unit_bits
        return pairs if self.dimension == 1 and pairs <= MADE_PAIRS else 1 << self.index_bits

    @property
    def column_groups(self) -> int:
        return -(-self.columns // self.group_columns)

    @property
    def words(self) -> int:
        """Of a row in a group of columns."""
        return -(-self.group_columns // (self.unit * self.per_word))

    @property
    def row_words(self) -> int:
        """Of a row."""
        return self.column_groups * self.words

    @property
    def filled(self) -> bool:
        """Whether every field of every word is in use."""
        in_words = self.row_words * self.per_word * self.unit
        return in_words == self.columns and self.columns == self.column_groups * self.group_columns

    @property
    def padded_columns(self) -> int:
        """As many as A is padded to: whole blocks of any factor."""
        return -(-self.columns // 64) * 64


@dataclass(frozen=True)
class CodebookLayout(IndexLayout):
    """What a kernel has to know of such a weight besides its tensors."""

    rows: int  # N

    @cached_property
    def compiled(self) -> IndexLayout:
        """All but the number of rows."""
        return IndexLayout(self.columns, self.dimension, self.index_bits, self.group_rows, self.group_columns)


@dataclass(frozen=True)
class Tile:
    """What a program takes at once: rows by words, and the tables, row groups by column groups, that they refer to."""

    rows: int
    words: int
    row_groups: int
    column_groups: int

    @property
    def tables(self) -> int:
        return self.row_groups * self.column_groups

    @property
    def warps(self) -> int:
        return max(1, self.rows * self.words // (QUAD * 32))


@cache
def tile_of(layout: IndexLayout) -> Tile:
    """The tile of a layout's programs: a word of four rows for each of 128 threads, fewer where tables are many."""
    rows = QUAD * 4 if layout.entries >= LONG_TABLE and layout.group_rows % (QUAD * 4) == 0 else QUAD
    words = THREADS * QUAD // rows

    def tile() -> Tile:
        return Tile(rows, words, _groups_of(rows, layout.group_rows), _groups_of(words, layout.words))

    while words > 8 and (words // 2 >= layout.row_words or tile().tables * layout.entries > MOST_ENTRIES):
        words //= 2
    return tile()


def _groups_of(run: int, group: int) -> int:
    """How many groups a run of elements can touch that begins at a multiple of its length; rounded up to a power of 2.

    Runs are powers of two.
    """
    if group % run == 0:
        return 1
    touched = run // group if run % group == 0 else (run + group - 2) // group + 1
    return 1 << (touched - 1).bit_length()


@dataclass(frozen=True)
class PackedCodebook:
    """The tensors of one weight in the layout above."""

    layout: CodebookLayout
    words: Tensor
    table: Tensor

    @property
    def parts(self) -> tuple[Tensor, None, Tensor, None]:
        """In the places of PackedWeight's: the table goes by the name of scales."""
        return self.words, None, self.table, None

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.table.nbytes


def check_codebook(number_format: Codebook) -> None:
    """Raise ValueError, stating the rule, for settings that the kernels do not read."""
    if number_format.scale_block_size:
        raise ValueError(
            f"scale_block_size {number_format.scale_block_size}: kernels read codebooks without block scales (codebook)"
        )


def pack_codebook(weight: QuantizedTensor, dtype: torch.dtype) -> PackedCodebook:
    """Lay out a weight (O, I) in "codebook", groups along K, with its centroids in `dtype`, rounded once.

    Raises ValueError for block scales and for groups along the other axis.
    """
    number_format = weight.format
    assert isinstance(number_format, Codebook)
    check_codebook(number_format)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"vectors must run along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    (rows, columns), groups = weight.shape, number_format.layout(*weight.shape)
    layout = CodebookLayout(
        columns, number_format.dimension, number_format.index_bits, groups.group_rows, groups.group_columns, rows
    )
    vectors = layout.group_columns // layout.dimension
    codes_OV = weight.parts["codes"].to(torch.int64)
    codes_OV = pad(codes_OV, (0, layout.column_groups * vectors - codes_OV.shape[1], 0, -len(codes_OV) % QUAD))
    per_unit = layout.unit // layout.dimension
    units = layout.words * layout.per_word
    codes_OGV = pad(codes_OV.unflatten(1, (layout.column_groups, vectors)), (0, units * per_unit - vectors))
    units_OGU = _side_by_side(codes_OGV.unflatten(2, (units, per_unit)), layout.field)
    words_OGW = _side_by_side(units_OGU.unflatten(2, (layout.per_word, layout.words)).mT, layout.unit_bits)
    words_OGW = torch.where(words_OGW >= 1 << 31, words_OGW - (1 << 32), words_OGW).to(torch.int32)
    words = words_OGW.flatten(1).unflatten(0, (-1, QUAD)).mT
    table = number_format.decode_centroids(weight.parts).to(dtype)
    return PackedCodebook(layout, words.contiguous(), table.contiguous())


def _side_by_side(fields: Tensor, bits: int) -> Tensor:
    """Fields of `bits` bits along the last axis, in one number each, the first in its lowest bits."""
    return (fields << torch.arange(fields.shape[-1], device=fields.device) * bits).sum(-1)
