"""Device functions in Gluon that load four-bit codes, integer groups or MXINT, and decode them for tall_gemm.py.

The tensor cores take 128 rows and 128 columns at a time, "a step", from the registers of eight warps. A warp has a row
group of 16 rows, 1 KB of words in both layouts; lane 4 g + t has eight words of rows g and g + 8 of it. Integer groups
(groups.py): words t of four steps of 32 columns, decoded as in groups_wide.py. MXINT (layout.py): word pairs t and
t + 4, decoded as in decode.py. Columns come in the order that both have there, in which tokens are too.

Shapes: O rows, C columns of a step; J words of a row in it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lqer.kernels.decode import ASM_4, BF16_8, CONSTRAINTS_4, RISE_4
from lqer.kernels.groups import GroupLayout
from lqer.kernels.groups_wide import SPREAD_CONSTRAINTS, WORD_CONSTRAINTS, spread_asm, types, word_asm
from lqer.kernels.layout import RowLayout

ROWS, COLUMNS, WARPS = 128, 128, 8
ROWS_G, COLUMNS_G, WARPS_G = gl.constexpr(ROWS), gl.constexpr(COLUMNS), gl.constexpr(WARPS)


@gluon.constexpr_function
def is_grouped(layout: GroupLayout | RowLayout) -> bool:
    return isinstance(layout, GroupLayout)


@gluon.constexpr_function
def steps_of(layout: GroupLayout | RowLayout) -> int:
    """Steps of a row, with codes or padding."""
    return layout.padded_columns // COLUMNS


@gluon.constexpr_function
def words_layout(grouped: bool) -> gl.DistributedLinearLayout:
    """Of integer groups [O, t, step of 32 columns], of MXINT [O, pair, odd]."""
    of_words = [[0, 0, 1], [0, 0, 2]] if grouped else [[0, 0, 1], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        [*of_words, [8, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        [],
        [ROWS, 4, 4] if grouped else [ROWS, 8, 2],
    )


@gluon.jit
def prefetch(words, scales, zeros, first_row, step, N, layout: gl.constexpr):
    """Fetch what `load` reads of a step to the L2 cache: 32 bytes a thread, no registers until they are used."""
    threads = gl.arange(0, 32 * WARPS_G, gl.BlockedLayout([1], [32], [WARPS_G], [0]))
    groups = gl.minimum(first_row // 16 + threads // 32, (N + 15) // 16 - 1)
    lanes = threads % 32
    step = gl.minimum(step, steps_of(layout) - 1)
    _fetch(words + (groups * steps_of(layout) + step) * 256 + lanes * 8)
    # Of a row group's unit: of scales as many bytes as there are rows and scales, a lane each; zero points as many.
    if is_grouped(layout):
        units = groups * layout.units + step // 2 // layout.strips_per_unit
        _fetch(scales + units * (16 * layout.groups) + lanes % layout.groups * 16)
        if not layout.symmetric:
            _fetch(zeros + units * (16 * layout.groups))
    else:
        units = groups * layout.units + step // layout.tiles_per_unit
        _fetch(scales + units * (16 * layout.scales_per_tile) + lanes % 4 * (4 * layout.scales_per_tile))


@gluon.jit
def _fetch(places):
    gl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l", (places.to(gl.int64),), dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def load(words, scales, zeros, first_row, step, N, layout: gl.constexpr):
    """Of a step: words as in `words_layout`, bits of its scales [O, 1, 1] or [O, pair, 1], zero points like these."""
    grouped: gl.constexpr = is_grouped(layout)
    split: gl.constexpr = words_layout(grouped)
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, split))
    rows_O = gl.arange(0, ROWS_G, of_rows)
    # Row groups beyond the last repeat it; their sums are not stored.
    group_O = gl.minimum((first_row + rows_O) // 16, (N + 15) // 16 - 1)
    row_O = rows_O % 16
    step = gl.minimum(step, steps_of(layout) - 1)
    place_O = ((group_O * steps_of(layout) + step) * 16 + row_O) * 16
    first: gl.constexpr = split.shape[1]
    last: gl.constexpr = split.shape[2]
    outer = gl.arange(0, first, gl.SliceLayout(0, gl.SliceLayout(2, split)))
    inner = gl.arange(0, last, gl.SliceLayout(0, gl.SliceLayout(1, split)))
    place = gl.expand_dims(gl.expand_dims(place_O, 1), 2) + gl.expand_dims(gl.expand_dims(outer * last, 0), 2)
    words_OJ = gl.load(words + (place + gl.expand_dims(gl.expand_dims(inner, 0), 1)))
    if grouped:
        unit_O = (group_O * layout.units + step // 2 // layout.strips_per_unit) * 8 + row_O % 8
        scale_O = (unit_O * layout.groups + step % 2 * (layout.groups // 2)) * 2 + row_O // 8
        scales_O = gl.load(scales.to(gl.pointer_type(gl.int16)) + scale_O).to(gl.int32)
        zeros_O = gl.full([ROWS_G], layout.offset, gl.int32, of_rows)
        if not layout.symmetric:
            zeros_O = gl.load(zeros + scale_O).to(gl.int32)
        return words_OJ, gl.expand_dims(gl.expand_dims(scales_O, 1), 2), gl.expand_dims(gl.expand_dims(zeros_O, 1), 2)
    else:
        per_tile: gl.constexpr = layout.scales_per_tile
        scale_O = ((group_O * layout.units + step // layout.tiles_per_unit) * 16 + row_O) * per_tile
        pair = gl.expand_dims(outer // (first // per_tile), 0)
        exponents = gl.load(scales + (gl.expand_dims(scale_O, 1) + pair)).to(gl.int32)
        return words_OJ, gl.expand_dims(exponents, 2), 0


@gluon.jit
def decode(words_OJ, scales, zeros, layout: gl.constexpr, dtype: gl.constexpr, operand: gl.constexpr):
    """A step [O, C] in `dtype`, where the tensor cores take it from."""
    if is_grouped(layout):
        bfloat: gl.constexpr = dtype == gl.bfloat16
        zero, high, low = gl.inline_asm_elementwise(
            spread_asm(layout, bfloat), SPREAD_CONSTRAINTS, (scales, zeros), dtype=types(gl.int32, 3),
            is_pure=True, pack=1,
        )  # fmt: skip
        v0, v1, v2, v3, v4, v5, v6, v7 = gl.inline_asm_elementwise(
            word_asm(layout, bfloat), WORD_CONSTRAINTS, (words_OJ, zero, high, low), dtype=types(gl.int16, 8),
            is_pure=True, pack=1,
        )  # fmt: skip
        even = gl.join(gl.join(v0, v4), gl.join(v2, v6))
        odd = gl.join(gl.join(v1, v5), gl.join(v3, v7))
        values_OC = gl.join(even, odd).permute(0, 2, 3, 4, 1, 5).reshape(ROWS_G, COLUMNS_G).to(dtype, bitcast=True)
    else:
        steps = (scales << 23).to(gl.float32, bitcast=True).to(gl.bfloat16)
        steps, words_OJ = gl.broadcast(steps, words_OJ)
        v0, v1, v2, v3, v4, v5, v6, v7 = gl.inline_asm_elementwise(
            RISE_4 if layout.mid_rise else ASM_4, CONSTRAINTS_4,
            (words_OJ.reshape(ROWS_G, 16), steps.reshape(ROWS_G, 16)), dtype=BF16_8, is_pure=True, pack=2,
        )  # fmt: skip
        even = gl.join(gl.join(v0, v4), gl.join(v2, v6))
        odd = gl.join(gl.join(v1, v5), gl.join(v3, v7))
        values_OC = gl.join(even, odd).permute(0, 2, 3, 4, 1).reshape(ROWS_G, COLUMNS_G)
    return gl.convert_layout(values_OC, operand, assert_trivial=True)
