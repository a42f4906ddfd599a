"""Kernels on learned codebooks: the product for a few tokens, and dequantization (layout/codebook.py).

A program processes a few rows and a tile of words of each at a time, one word of four rows per thread. The tables that
the tile's indices refer to are staged in shared memory as pairs of values; one look-up there yields two columns.

Shapes: M tokens, I in_features, O out_features. Tensors of the product are [W, R, J, M]: W words, R rows of a program
(ranks in the low-rank branch), J fields of a word.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.layout.codebook import QUAD
from lqer.kernels.low_rank import load_factor
from lqer.kernels.rounding import round_columns
from lqer.kernels.runtime import INTERPRETED

QUAD_C = tl.constexpr(QUAD)


@triton.jit
def _as_pairs(values):
    """A pointer to 16-bit values as a pointer to pairs of them."""
    return tl.cast(values, tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _half(pair, high: tl.constexpr, dtype: tl.constexpr):
    """One of the two 16-bit values of an int32."""
    if high:
        return (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        return pair.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _half_as_float(pair, high: tl.constexpr, dtype: tl.constexpr):
    """The same in float32: one instruction for bfloat16."""
    if dtype != tl.bfloat16:
        return _half(pair, high, dtype).to(tl.float32)
    elif high:
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load_words(words, rows_R, words_W, N, layout: tl.constexpr):
    """Words of every row [W, R]; zero outside the weight."""
    quad = rows_R // QUAD_C
    inside = (words_W < layout.row_words) & (quad < (N + QUAD_C - 1) // QUAD_C)
    return tl.load(words + (quad * layout.row_words + words_W) * QUAD_C + rows_R % QUAD_C, mask=inside, other=0)


@triton.jit
def _load_bits(values, inside):
    return tl.load(tl.cast(values, tl.pointer_type(tl.uint16), bitcast=True), mask=inside, other=0).to(tl.int32)


@triton.jit
def _load_tables(table, first_row, first_word, N, layout: tl.constexpr, program: tl.constexpr):
    """The tables of a program's row and column groups, from those of `first_row` and `first_word` on, concatenated.

    Tables of groups outside the weight are zero. An entry is a centroid of four values (int64) or of two (int32). If
    centroids have one value, it is a pair of them (int32) or, where a table of all pairs would be long, one of them.
    """
    entries: tl.constexpr = layout.entries
    groups: tl.constexpr = program.column_groups
    e = tl.arange(0, program.tables * entries)
    row_group = tl.minimum(first_row // layout.group_rows + e // (groups * entries), (N - 1) // layout.group_rows)
    column_group = first_word // layout.words + e // entries % groups
    inside = column_group < layout.column_groups
    first = (row_group * layout.column_groups + column_group) << layout.index_bits
    entry = e % entries
    if layout.dimension == 4:
        return tl.load(tl.cast(table, tl.pointer_type(tl.int64), bitcast=True) + first + entry, mask=inside, other=0)
    elif layout.dimension == 2:
        return tl.load(_as_pairs(table) + first + entry, mask=inside, other=0)
    elif entries == 1 << layout.index_bits:
        return _load_bits(table + first + entry, inside)
    else:
        low = _load_bits(table + first + entry % (1 << layout.index_bits), inside)
        return low | (_load_bits(table + first + (entry >> layout.index_bits), inside) << 16)


@triton.jit
def _first_entries(rows_R, words_W, first_row, first_word, layout: tl.constexpr, program: tl.constexpr):
    """Offset of each word's table in the loaded tables [W, R]."""
    row_group = rows_R // layout.group_rows - first_row // layout.group_rows
    column_group = words_W // layout.words - first_word // layout.words
    return (row_group * program.column_groups + column_group) * layout.entries


@triton.jit
def _gather(tables, index):
    return tl.gather(tables, index.reshape(index.numel), 0).reshape(index.shape)


@triton.jit
def _look_up(tables, first_entries, words_WR, units_J, layout: tl.constexpr):
    """Units of each word as pairs of 16-bit values, int32: a tuple of one, or of two if centroids have four values."""
    shifts_J = (units_J * layout.unit_bits).to(tl.uint32)
    index = (words_WR.to(tl.uint32, bitcast=True) >> shifts_J).to(tl.int32, bitcast=True)
    last: tl.constexpr = layout.entries - 1
    entry = _gather(tables, first_entries + (index & last))
    if layout.dimension == 4:
        return entry.to(tl.int32), (entry >> 32).to(tl.int32)
    elif layout.dimension == 1 and layout.entries == 1 << layout.index_bits:
        return (entry | (_gather(tables, first_entries + ((index >> layout.field) & last)) << 16),)
    else:
        return (entry,)


@triton.jit
def _columns(words_W, units_J, layout: tl.constexpr):
    """First column of each unit: the first column of its group [W], and the offset from it [W, 1, J]."""
    of_group = words_W // layout.words * layout.group_columns
    return of_group, (units_J * layout.words + words_W % layout.words) * layout.unit


@triton.jit
def _inside(words_W, group_columns, columns, K, layout: tl.constexpr):
    return (words_W < layout.row_words) & (columns < layout.group_columns) & (group_columns + columns < K)


@triton.jit
def _read_pairs(pointers):
    """Load pairs in the layout of their pointers; tl.load would choose another layout and convert to this one."""
    if INTERPRETED:
        return tl.load(_as_pairs(pointers))
    else:
        # Not pure: it must not move above the wait for the kernel that writes x.
        return tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [_as_pairs(pointers)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _low_rank(
    projection, b_codes, b_exponents, tokens_M, first_row, M, N, rank: tl.constexpr, b_block: tl.constexpr,
    rounding: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Q(Q(x A) B) of ROWS rows, float32 [M, R]; computed for whole blocks of rows if the product is rounded."""
    block: tl.constexpr = rounding.block if rounding.bits > 0 else 16
    width: tl.constexpr = max(ROWS, rounding.block if rounding.bits > 0 else ROWS)
    step: tl.constexpr = max(block, b_block)
    columns_O = first_row // width * width + tl.arange(0, width)
    product = tl.zeros((tokens_M.shape[0], width), tl.float32)
    for first in range(0, rank, step):
        ranks_R = first + tl.arange(0, step)
        inside = (tokens_M < M)[:, None] & (ranks_R < rank)[None, :]
        xa_MR = tl.load(projection + tokens_M[:, None] * rank + ranks_R[None, :], mask=inside, other=0.0)
        if rounding.bits > 0:
            xa_MR = round_columns(xa_MR, rounding)
        b_RO = load_factor(b_codes, b_exponents, first, columns_O, N, rank, step, b_block, tl.float32)
        product += tl.sum(xa_MR.to(dtype).to(tl.float32)[:, :, None] * b_RO[None, :, :], axis=1)
    if rounding.bits > 0:
        product = round_columns(product, rounding)
    parts: tl.constexpr = width // ROWS
    ours = tl.arange(0, parts)[None, :, None] == first_row % width // ROWS
    return tl.sum(tl.where(ours, product.reshape(tokens_M.shape[0], parts, ROWS), 0.0), axis=1)


# M changes from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def codebook_product_kernel(
    x,  # [M, I]
    words,  # these two as in layout/codebook.py
    table,
    bias,  # [O], or None
    projection,  # x_q A, float32 [M, RP], or None
    b_codes,  # [RP, O] int8 or values, or None
    b_exponents,  # [RP / b_block, O] uint8, or None
    y,  # [M, O]
    M,
    N,
    K,
    x_stride,  # between rows of x
    rank: tl.constexpr,
    rounding: tl.constexpr,  # ActivationRounding
    b_block: tl.constexpr,
    layout: tl.constexpr,  # IndexLayout
    program: tl.constexpr,  # Tile
    FIELDS: tl.constexpr,  # of a word, looked up at once
    BLOCK_M: tl.constexpr,
    pdl: tl.constexpr,
):
    """y = W x + b + Q(Q(x A) B) of program.rows rows and BLOCK_M tokens; products with W and sums in float32."""
    ROWS: tl.constexpr = program.rows
    TILE: tl.constexpr = program.words
    units: tl.constexpr = layout.per_word
    pairs_of_unit: tl.constexpr = layout.unit // 2
    dtype: tl.constexpr = x.dtype.element_ty
    first_row = tl.program_id(0) * ROWS
    rows_R = first_row + tl.arange(0, ROWS)[None, :, None, None]
    tile_W = tl.arange(0, TILE)[:, None, None, None]
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_M = x + tl.minimum(tokens, M - 1).to(tl.int64)[None, None, None, :] * x_stride
    # Weights do not depend on the previous kernel: prefetch the first ones while it still runs.
    words_WR = _load_words(words, rows_R, tile_W, N, layout)
    tables = _load_tables(table, first_row, 0, N, layout, program)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    if rank > 0:
        branch_MR = _low_rank(
            projection, b_codes, b_exponents, tokens, first_row, M, N, rank, b_block, rounding,
            dtype, ROWS,
        )  # fmt: skip
    acc = tl.zeros((TILE, ROWS, FIELDS, BLOCK_M), tl.float32)
    for first_word in range(0, layout.row_words, TILE):
        following = first_word + TILE
        next_words_WR = _load_words(words, rows_R, following + tile_W, N, layout)
        next_tables = _load_tables(table, first_row, following, N, layout, program)
        words_W = first_word + tile_W
        # Beyond the last word of a row tables are zero, and any x that is finite will do.
        x_words_W = tl.minimum(words_W, layout.row_words - 1)
        first_entries = _first_entries(rows_R, words_W, first_row, first_word, layout, program)
        for first_unit in tl.static_range(0, units, FIELDS):
            units_J = first_unit + tl.arange(0, FIELDS)[None, None, :, None]
            pairs = _look_up(tables, first_entries, words_WR, units_J, layout)
            group_columns, columns = _columns(x_words_W, units_J, layout)
            pointers = x_M + group_columns + columns
            for p in tl.static_range(pairs_of_unit):
                if layout.filled:
                    x_pairs = _read_pairs(pointers + 2 * p)
                    low, high = _half_as_float(x_pairs, False, dtype), _half_as_float(x_pairs, True, dtype)
                else:
                    inside = _inside(words_W, group_columns, columns + 2 * p, K, layout)
                    low = tl.load(pointers + 2 * p, mask=inside, other=0.0).to(tl.float32)
                    inside = _inside(words_W, group_columns, columns + 2 * p + 1, K, layout)
                    high = tl.load(pointers + 2 * p + 1, mask=inside, other=0.0).to(tl.float32)
                acc += _half_as_float(pairs[p], False, dtype) * low
                acc += _half_as_float(pairs[p], True, dtype) * high
        words_WR, tables = next_words_WR, next_tables
    y_RM = tl.sum(tl.sum(acc, axis=2), axis=0)
    rows = first_row + tl.arange(0, ROWS)
    if rank > 0:
        y_RM += tl.trans(branch_MR)
    if bias is not None:
        y_RM += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    inside = (rows < N)[:, None] & (tokens < M)[None, :]
    tl.store(y + tokens[None, :] * N + rows[:, None], y_RM.to(y.dtype.element_ty), mask=inside)


@triton.jit
def codebook_dequantize_kernel(
    words,  # these two as in layout/codebook.py
    table,
    w_out,  # [O, I]
    N,
    K,
    layout: tl.constexpr,  # IndexLayout
    program: tl.constexpr,  # Tile
    FIELDS: tl.constexpr,
):
    """Decode one tile of words to memory."""
    ROWS: tl.constexpr = program.rows
    TILE: tl.constexpr = program.words
    units: tl.constexpr = layout.per_word
    pairs_of_unit: tl.constexpr = layout.unit // 2
    dtype: tl.constexpr = w_out.dtype.element_ty
    first_row, first_word = tl.program_id(0) * ROWS, tl.program_id(1) * TILE
    rows_R = first_row + tl.arange(0, ROWS)[None, :, None, None]
    words_W = first_word + tl.arange(0, TILE)[:, None, None, None]
    words_WR = _load_words(words, rows_R, words_W, N, layout)
    tables = _load_tables(table, first_row, first_word, N, layout, program)
    first_entries = _first_entries(rows_R, words_W, first_row, first_word, layout, program)
    for first_unit in tl.static_range(0, units, FIELDS):
        units_J = first_unit + tl.arange(0, FIELDS)[None, None, :, None]
        pairs = _look_up(tables, first_entries, words_WR, units_J, layout)
        group_columns, columns = _columns(words_W, units_J, layout)
        place = w_out + rows_R.to(tl.int64) * K + group_columns + columns
        for p in tl.static_range(pairs_of_unit):
            if layout.filled:
                tl.store(_as_pairs(place + 2 * p), pairs[p], mask=(words_W < layout.row_words) & (rows_R < N))
            else:
                inside = _inside(words_W, group_columns, columns + 2 * p, K, layout)
                low, high = _half(pairs[p], False, dtype), _half(pairs[p], True, dtype)
                tl.store(place + 2 * p, low, mask=inside & (rows_R < N))
                inside = _inside(words_W, group_columns, columns + 2 * p + 1, K, layout)
                tl.store(place + 2 * p + 1, high, mask=inside & (rows_R < N))
