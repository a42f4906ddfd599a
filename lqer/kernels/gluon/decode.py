"""What both kernels for four-bit codes in Gluon share on the device: decoding, and the store of an output tile.

A step is 64 or 128 rows of W and 128 columns, the operand of wgmma that comes from registers. A warp has a row group of
16 rows, 1 KB of words in both layouts; lane 4 g + t has eight words of rows g and g + 8 of it. Integer groups
(layout/groups.py): words t of four steps of 32 columns, decoded as in integers/groups_wide.py. MXINT (layout/codes.py):
word pairs t and t + 4, decoded as in decode.py. Columns come in the order that both have there, in which tokens are
too.

Shapes: M tokens, O rows of W, C columns of a step; J words of a row in it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lqer.kernels.decode import ASM_4, BF16_8, CONSTRAINTS_4, RISE_4
from lqer.kernels.integers.groups_wide import SPREAD_CONSTRAINTS, WORD_CONSTRAINTS, spread_asm, types, word_asm
from lqer.kernels.layout.codes import RowLayout
from lqer.kernels.layout.groups import GroupLayout

COLUMNS = 128
COLUMNS_G = gl.constexpr(COLUMNS)


@gluon.constexpr_function
def is_grouped(layout: GroupLayout | RowLayout) -> bool:
    return isinstance(layout, GroupLayout)


@gluon.constexpr_function
def steps_of(layout: GroupLayout | RowLayout) -> int:
    """Steps of a row, with codes or padding."""
    return layout.padded_columns // COLUMNS


@gluon.jit
def decode(words_OJ, scales, zeros, layout: gl.constexpr, dtype: gl.constexpr, operand: gl.constexpr):
    """A step [O, C] in `dtype`, where the tensor cores take it from."""
    rows: gl.constexpr = words_OJ.shape[0]
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
        values_OC = gl.join(even, odd).reshape(rows, 4, 4, 2, 2, 2).permute(0, 2, 3, 4, 1, 5)
        values_OC = values_OC.reshape(rows, COLUMNS_G).to(dtype, bitcast=True)
    else:
        steps = (scales << 23).to(gl.float32, bitcast=True).to(gl.bfloat16)
        steps, words_OJ = gl.broadcast(steps, words_OJ)
        v0, v1, v2, v3, v4, v5, v6, v7 = gl.inline_asm_elementwise(
            RISE_4 if layout.mid_rise else ASM_4, CONSTRAINTS_4,
            (words_OJ.reshape(rows, 16), steps.reshape(rows, 16)), dtype=BF16_8, is_pure=True, pack=2,
        )  # fmt: skip
        even = gl.join(gl.join(v0, v4), gl.join(v2, v6))
        odd = gl.join(gl.join(v1, v5), gl.join(v3, v7))
        values_OC = gl.join(even, odd).permute(0, 2, 3, 4, 1).reshape(rows, COLUMNS_G)
    return gl.convert_layout(values_OC, operand, assert_trivial=True)


@gluon.constexpr_function
def _stored_layout(rows: int, warps: int) -> gl.BlockedLayout:
    """Of [O, M]: 16 bytes of a token's outputs a thread, and the rows of a tile adjoin."""
    return gl.BlockedLayout([8, 1], [rows // 8, 256 // rows], [1, warps], [0, 1])


@gluon.jit
def add_written(acc_OM, y, first_row, first_token, M, N):
    """The sum of a tile and what y holds there."""
    rows_O = first_row + gl.arange(0, acc_OM.shape[0], gl.SliceLayout(1, acc_OM.type.layout))
    columns_M = first_token + gl.arange(0, acc_OM.shape[1], gl.SliceLayout(0, acc_OM.type.layout))
    inside_OM = gl.expand_dims(rows_O < N, 1) & gl.expand_dims(columns_M < M, 0)
    place_OM = y + (gl.expand_dims(columns_M.to(gl.int64) * N, 0) + gl.expand_dims(rows_O, 1))
    return acc_OM + gl.load(place_OM, mask=inside_OM, other=0.0).to(gl.float32)


@gluon.jit
def write(acc_OM, bias, y, first_row, first_token, M, N, adds: gl.constexpr):
    """Write y = sum + bias, or y + sum if `adds`."""
    rows: gl.constexpr = acc_OM.shape[0]
    BLOCK_M: gl.constexpr = acc_OM.shape[1]
    if adds:
        acc_OM = add_written(acc_OM, y, first_row, first_token, M, N)
    stored: gl.constexpr = _stored_layout(rows, gl.num_warps())
    if bias is not None:
        rows_O = first_row + gl.arange(0, rows, gl.SliceLayout(1, acc_OM.type.layout))
        acc_OM += gl.expand_dims(gl.load(bias + rows_O, mask=rows_O < N, other=0.0).to(gl.float32), 1)
    rows_O = first_row + gl.arange(0, rows, gl.SliceLayout(1, stored))
    columns_M = first_token + gl.arange(0, BLOCK_M, gl.SliceLayout(0, stored))
    inside_OM = gl.expand_dims(rows_O < N, 1) & gl.expand_dims(columns_M < M, 0)
    place_OM = y + (gl.expand_dims(columns_M.to(gl.int64) * N, 0) + gl.expand_dims(rows_O, 1))
    # Rounded before it goes through shared memory.
    gl.store(place_OM, gl.convert_layout(acc_OM.to(y.dtype.element_ty), stored), mask=inside_OM)
