"""Weights of learned codebooks: D neighbours of a row share an index into a table of their group.

    words    int32 [N, column groups, words]          indices of a row, in fields of 1, 2, 4 or 8 bits
    table    [row groups, column groups, 2^b, D]      centroids, as the values that they stand for

The indices of every group of columns begin with a word of their own, and widths between the fields' are rounded up. A
table of 16 pairs is 64 bytes: the threads of a warp find their centroids in one line of the first cache.

Shapes: M tokens, N out_features, K in_features, W words, D elements of a centroid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import Codebook, QuantizedTensor

FIELD_BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class CodebookLayout:
    """What a kernel has to know of such a weight besides its tensors; all of it fixed at compile time."""

    rows: int  # N
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
    def per_word(self) -> int:
        return 32 // self.field

    @property
    def column_groups(self) -> int:
        return -(-self.columns // self.group_columns)

    @property
    def words(self) -> int:
        """Of a row in a group of columns."""
        return -(-self.group_columns // (self.dimension * self.per_word))

    @property
    def padded_columns(self) -> int:
        """As many as A is padded to: whole blocks of any factor."""
        return -(-self.columns // 64) * 64


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
    """Lay out a weight (N, K) in "codebook", groups along K, with its centroids in `dtype`, rounded once.

    Raises ValueError for block scales and for groups along the other axis.
    """
    number_format = weight.format
    assert isinstance(number_format, Codebook)
    check_codebook(number_format)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"vectors must run along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    groups = number_format.layout(*weight.shape)
    layout = CodebookLayout(
        *weight.shape, number_format.dimension, number_format.index_bits, groups.group_rows, groups.group_columns
    )
    codes_NV = weight.parts["codes"].to(torch.int64)
    vectors = layout.group_columns // layout.dimension
    codes_NV = pad(codes_NV, (0, layout.column_groups * vectors - codes_NV.shape[1]))
    codes_NGV = pad(
        codes_NV.unflatten(1, (layout.column_groups, vectors)), (0, layout.words * layout.per_word - vectors)
    )
    shifts_J = torch.arange(layout.per_word, device=codes_NV.device) * layout.field
    words = (codes_NGV.unflatten(2, (layout.words, layout.per_word)) << shifts_J).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    table = number_format.decode_centroids(weight.parts).to(dtype)
    return PackedCodebook(layout, words.contiguous(), table.contiguous())


@triton.jit
def _centroids(table, base_N, index_NW, d: tl.constexpr, DIMENSION: tl.constexpr):
    """Element d of the centroids, float32 [N, W]."""
    return tl.load(table + (base_N[:, None] + index_NW) * DIMENSION + d).to(tl.float32)


@triton.jit
def _columns(group, inside_W, K, GROUP_COLUMNS: tl.constexpr):
    """Columns of the weight from their places in a group, and which of them are there."""
    column_W = group * GROUP_COLUMNS + inside_W
    return column_W, (inside_W < GROUP_COLUMNS) & (column_W < K)


@triton.jit
def _load_words(words, rows_N, group, words_W, N, COLUMN_GROUPS: tl.constexpr, WORDS: tl.constexpr):
    place = words + (rows_N * COLUMN_GROUPS + group)[:, None] * WORDS + words_W[None, :]
    return tl.load(place, mask=(rows_N < N)[:, None] & (words_W < WORDS)[None, :], other=0)


# M changes from call to call: no new compilation for 1, or for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def codebook_product_kernel(
    x,  # [M, K], rows `x_stride` apart
    words,
    table,
    bias,  # [N], or None
    start,  # [M, N], what is added to the product, or None
    y,  # [M, N]
    M,
    N,
    K,
    x_stride,
    GROUP_ROWS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    DIMENSION: tl.constexpr,
    FIELD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y = W x + b for up to BLOCK_M tokens, each program whole rows of W, products and sums in float32."""
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_groups_N = tl.minimum(rows_N, N - 1) // GROUP_ROWS
    per_word: tl.constexpr = 32 // FIELD
    acc_NWM = tl.zeros((BLOCK_N, BLOCK_W, BLOCK_M), tl.float32)
    for group in range(COLUMN_GROUPS):
        base_N = (row_groups_N * COLUMN_GROUPS + group) * CENTROIDS
        for first in tl.static_range(0, WORDS, BLOCK_W):
            words_W = first + tl.arange(0, BLOCK_W)
            words_NW = _load_words(words, rows_N, group, words_W, N, COLUMN_GROUPS, WORDS)
            for j in tl.static_range(per_word):
                index_NW = (words_NW >> (j * FIELD)) & (CENTROIDS - 1)
                inside_W = (words_W * per_word + j) * DIMENSION
                for d in tl.static_range(DIMENSION):
                    column_W, mask_W = _columns(group, inside_W + d, K, GROUP_COLUMNS)
                    x_place = x + rows_M[None, :].to(tl.int64) * x_stride + column_W[:, None]
                    x_WM = tl.load(x_place, mask=mask_W[:, None] & (rows_M < M)[None, :], other=0.0).to(tl.float32)
                    w_NW = _centroids(table, base_N, index_NW, d, DIMENSION)
                    acc_NWM += w_NW[:, :, None] * x_WM[None, :, :]
    y_NM = tl.sum(acc_NWM, axis=1)
    if bias is not None:
        y_NM += tl.load(bias + rows_N, mask=rows_N < N, other=0.0).to(tl.float32)[:, None]
    place = rows_M[None, :] * N + rows_N[:, None]
    inside_NM = (rows_N < N)[:, None] & (rows_M < M)[None, :]
    if start is not None:
        y_NM += tl.load(start + place, mask=inside_NM, other=0.0).to(tl.float32)
    tl.store(y + place, y_NM.to(y.dtype.element_ty), mask=inside_NM)


@triton.jit
def codebook_expand_kernel(
    words,
    table,
    w_out,  # [N, K]
    N,
    K,
    GROUP_ROWS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    DIMENSION: tl.constexpr,
    FIELD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Decode BLOCK_N rows of one group of columns."""
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    base_N = (tl.minimum(rows_N, N - 1) // GROUP_ROWS * COLUMN_GROUPS + group) * CENTROIDS
    per_word: tl.constexpr = 32 // FIELD
    for first in tl.static_range(0, WORDS, BLOCK_W):
        words_W = first + tl.arange(0, BLOCK_W)
        words_NW = _load_words(words, rows_N, group, words_W, N, COLUMN_GROUPS, WORDS)
        for j in tl.static_range(per_word):
            index_NW = (words_NW >> (j * FIELD)) & (CENTROIDS - 1)
            inside_W = (words_W * per_word + j) * DIMENSION
            for d in tl.static_range(DIMENSION):
                column_W, mask_W = _columns(group, inside_W + d, K, GROUP_COLUMNS)
                w_NW = _centroids(table, base_N, index_NW, d, DIMENSION)
                place = w_out + rows_N.to(tl.int64)[:, None] * K + column_W[None, :]
                tl.store(place, w_NW.to(w_out.dtype.element_ty), mask=(rows_N < N)[:, None] & mask_W[None, :])
