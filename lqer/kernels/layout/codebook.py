"""Memory layout of learned codebooks: each vector of d adjacent weights of a row is an index into its group's table.

    words    int32 [rows / 4, W, 4]                   indices: W words of each of four rows
    table    [row groups, column groups, 2^b, d]      centroids, in the dtype of the layer

A thread looks up one unit at a time: one index, or the two of adjacent columns if d is 1; so two or four columns. An
index is stored in 1, 2, 4 or 8 bits, the fewest that hold it. Every group of columns starts with a new word. Field j of
word w of a group is unit j * (words of a group) + w, so that adjacent words, and with them adjacent threads, hold
adjacent columns. Words of four rows are interleaved: a thread that loads 16 bytes gets a word of each row and reads the
activations only once for all four.

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
QUAD = 4  # interleaved rows
MADE_PAIRS = 16  # a table of single values is staged as a table of all pairs if it has at most so many
THREADS = 128
LONG_TABLE = 128  # entries from which a program computes 16 rows instead of 4
MOST_ENTRIES = 2048  # in shared memory at once


@dataclass(frozen=True)
class IndexLayout:
    """Layout of indices and tables, without the number of rows: kernels are compiled once for each IndexLayout."""

    columns: int
    dimension: int
    index_bits: int
    group_rows: int
    group_columns: int

    @property
    def field(self) -> int:
        """Bits of an index in a word."""
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
        """Entries of a group's table in shared memory: pairs of values if they are few, else centroids."""
        pairs: int = 1 << self.unit_bits
        return pairs if self.dimension == 1 and pairs <= MADE_PAIRS else 1 << self.index_bits

    @property
    def column_groups(self) -> int:
        return -(-self.columns // self.group_columns)

    @property
    def words(self) -> int:
        """Words of a row in a group of columns."""
        return -(-self.group_columns // (self.unit * self.per_word))

    @property
    def row_words(self) -> int:
        """Words of a row."""
        return self.column_groups * self.words

    @property
    def filled(self) -> bool:
        """Whether every field of every word holds an index of the weight."""
        in_words = self.row_words * self.per_word * self.unit
        return in_words == self.columns and self.columns == self.column_groups * self.group_columns

    @property
    def padded_columns(self) -> int:
        """Columns that A is padded to: whole blocks of any supported factor format."""
        return -(-self.columns // 64) * 64


@dataclass(frozen=True)
class CodebookLayout(IndexLayout):
    """All that describes such a weight besides its tensors."""

    rows: int

    @cached_property
    def compiled(self) -> IndexLayout:
        """The layout without the number of rows."""
        return IndexLayout(self.columns, self.dimension, self.index_bits, self.group_rows, self.group_columns)


@dataclass(frozen=True)
class Tile:
    """The rows and words that a program processes at once, and the row and column groups whose tables these need."""

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
    """The tile of a layout's programs: a word of four rows for each of 128 threads, fewer if it needs many tables."""
    rows = QUAD * 4 if layout.entries >= LONG_TABLE and layout.group_rows % (QUAD * 4) == 0 else QUAD
    words = THREADS * QUAD // rows

    def tile() -> Tile:
        return Tile(rows, words, _groups_of(rows, layout.group_rows), _groups_of(words, layout.words))

    while words > 8 and (words // 2 >= layout.row_words or tile().tables * layout.entries > MOST_ENTRIES):
        words //= 2
    return tile()


def _groups_of(run: int, group: int) -> int:
    """The most groups that `run` elements, from a multiple of `run` on, can belong to; rounded up to a power of two.

    run: a power of two.
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
        """In the order of PackedWeight.parts: the table takes the place of the scales."""
        return self.words, None, self.table, None

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.table.nbytes


def check_codebook(number_format: Codebook) -> None:
    """Raise ValueError, with the rule, for settings that the kernels do not support."""
    if number_format.scale_block_size:
        raise ValueError(
            f"scale_block_size {number_format.scale_block_size}: kernels do not support block scales (codebook)"
        )


def pack_codebook(weight: QuantizedTensor, dtype: torch.dtype) -> PackedCodebook:
    """Pack a "codebook" weight [O, I] with vectors along axis 1; its centroids are rounded to `dtype` once.

    Raises ValueError for block scales and for vectors along axis 0.
    """
    number_format = weight.format
    assert isinstance(number_format, Codebook)
    check_codebook(number_format)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"vectors must be along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
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
    units_OGU = _join_fields(codes_OGV.unflatten(2, (units, per_unit)), layout.field)
    words_OGW = _join_fields(units_OGU.unflatten(2, (layout.per_word, layout.words)).mT, layout.unit_bits)
    words_OGW = torch.where(words_OGW >= 1 << 31, words_OGW - (1 << 32), words_OGW).to(torch.int32)
    words = words_OGW.flatten(1).unflatten(0, (-1, QUAD)).mT
    table = number_format.decode_centroids(weight.parts).to(dtype)
    return PackedCodebook(layout, words.contiguous(), table.contiguous())


def _join_fields(fields: Tensor, bits: int) -> Tensor:
    """Join fields of `bits` bits along the last axis into one number, the first field in its lowest bits."""
    return (fields << torch.arange(fields.shape[-1], device=fields.device) * bits).sum(-1)
