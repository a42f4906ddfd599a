"""Device functions in Gluon that read four-bit codes, integer groups or MXINT, from shared memory.

For stream_gemm.py, whose tensor cores take 64 rows of a step from the registers of four warps (decode.py). Shared
memory holds of R row groups: words [R, 8, 32] in the order of memory; scales [R, 1, S] and zero points, those of a unit
of the layout.

Shapes: O rows, J words of a row in a step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lqer.kernels.gluon.decode import is_grouped
from lqer.kernels.layout.codes import RowLayout
from lqer.kernels.layout.groups import GroupLayout

ROWS, WARPS = 64, 4
ROWS_G, WARPS_G = gl.constexpr(ROWS), gl.constexpr(WARPS)
GROUPS_G = gl.constexpr(ROWS // 16)
OF_WARPS = [[1, 0, 0], [2, 0, 0]]


@gluon.constexpr_function
def has_zeros(layout: GroupLayout | RowLayout) -> bool:
    return isinstance(layout, GroupLayout) and not layout.symmetric


@gluon.constexpr_function
def bytes_of(block) -> int:
    """Of what a descriptor copies."""
    size = block.dtype.primitive_bitwidth // 8
    for length in block.block_shape:
        size *= length
    return size


@gluon.constexpr_function
def steps_per_unit(layout: GroupLayout | RowLayout) -> int:
    """Steps whose scales lie together."""
    return 2 * layout.strips_per_unit if isinstance(layout, GroupLayout) else layout.tiles_per_unit


@gluon.constexpr_function
def scales_per_unit(layout: GroupLayout | RowLayout) -> int:
    """Scales of 16 rows that lie together."""
    return 16 * (layout.groups if isinstance(layout, GroupLayout) else layout.scales_per_tile)


@gluon.constexpr_function
def words_layout(grouped: bool) -> gl.DistributedLinearLayout:
    """Of a row group's words in the order of memory: lane 4 g + t has eight of them."""
    if grouped:
        registers, lanes = [[0, 0, 1], [0, 0, 2]], [[0, 0, 4], [0, 0, 8]]
    else:
        registers, lanes = [[0, 0, 1], [0, 0, 8]], [[0, 0, 2], [0, 0, 4]]
    rows = [[0, 0, 16], [0, 1, 0], [0, 2, 0]]
    return gl.DistributedLinearLayout([*registers, [0, 4, 0]], [*lanes, *rows], OF_WARPS, [], [ROWS // 16, 8, 32])


@gluon.constexpr_function
def split_layout(layout: GroupLayout | RowLayout) -> gl.DistributedLinearLayout:
    """The same of integer groups as [O, t, step of 32 columns, 1], of MXINT [O, block, pair of it, odd]."""
    rows = [[1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    if isinstance(layout, GroupLayout):
        registers, lanes, shape = [[0, 0, 1, 0], [0, 0, 2, 0]], [[0, 1, 0, 0], [0, 2, 0, 0]], [ROWS, 4, 4, 1]
    else:
        blocks = layout.scales_per_tile
        of_block = 8 // blocks
        pairs = [[0, 0, 1 << i, 0] if 1 << i < of_block else [0, (1 << i) // of_block, 0, 0] for i in range(3)]
        registers, lanes, shape = [[0, 0, 0, 1], pairs[2]], pairs[:2], [ROWS, blocks, of_block, 2]
    return gl.DistributedLinearLayout([*registers, [8, 0, 0, 0]], [*lanes, *rows], warps, [], shape)


@gluon.constexpr_function
def scales_layout(layout: GroupLayout | RowLayout, held: int) -> gl.DistributedLinearLayout:
    """Of a unit's scales: those of a lane's rows, of integer groups all groups, of MXINT those of its word pairs."""
    shape = [held, 1, scales_per_unit(layout)]
    # Of row groups that follow, if they are held.
    more = [[ROWS // 16, 0, 0]] * (held > ROWS // 16)
    if isinstance(layout, GroupLayout):
        groups = layout.groups
        registers = [[0, 0, 1 << i] for i in range(groups.bit_length())] + more
        rows = [[0, 0, 2 * groups << i] for i in range(3)]
        return gl.DistributedLinearLayout(registers, [[0, 0, 0], [0, 0, 0], *rows], OF_WARPS, [], shape)
    per_row = layout.scales_per_tile
    # Bit i of a pair's number is bit i - shared of its scale's.
    shared = 3 - (per_row.bit_length() - 1)
    pairs = [[0, 0, 1 << i - shared if i >= shared else 0] for i in range(3)]
    rows = [[0, 0, per_row << i] for i in range(4)]
    registers = [pairs[2]] * (shared < 3) + [rows[3]] + more
    return gl.DistributedLinearLayout(registers, [*pairs[:2], *rows[:3]], OF_WARPS, [], shape)


@gluon.constexpr_function
def groups_held(layout: GroupLayout | RowLayout, size: int) -> int:
    """Row groups whose scales or zero points of `size` bytes are copied at once: 128 bytes, which copies need."""
    return max(ROWS // 16, 128 // (size * scales_per_unit(layout)))


@gluon.jit
def _load_unit(parts, layout: gl.constexpr):
    """[4, 1, S]: the scales or zero points of a block's row groups."""
    held: gl.constexpr = parts.shape[0]
    found = parts.load(scales_layout(layout, held))
    if held > GROUPS_G:
        found, _ = gl.split(found.reshape(2, GROUPS_G, 1, scales_per_unit(layout)).permute(1, 2, 3, 0))
    return found


@gluon.jit
def load(words, scales, zeros, odd, layout: gl.constexpr):
    """Of a step: words as in `split_layout`, bits of its scales [O, 1 or block, 1, 1], zero points like these.

    odd: whether it is the second of a strip.
    """
    split: gl.constexpr = split_layout(layout)
    words_OJ = words.load(words_layout(is_grouped(layout))).reshape(split.shape)
    words_OJ = gl.convert_layout(words_OJ, split, assert_trivial=True)
    if is_grouped(layout):
        scales_O = _of_half(scales, odd, layout, split)
        zeros_O = _of_half(zeros, odd, layout, split) if has_zeros(layout) else gl.full_like(scales_O, layout.offset)
        return words_OJ, scales_O, zeros_O
    else:
        of_blocks: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, split))
        exponents = _load_unit(scales, layout).to(gl.int32).reshape(ROWS_G, layout.scales_per_tile)
        exponents = gl.convert_layout(exponents, of_blocks, assert_trivial=True)
        return words_OJ, gl.expand_dims(gl.expand_dims(exponents, 2), 3), 0


@gluon.jit
def _of_half(parts, odd, layout: gl.constexpr, split: gl.constexpr):
    """int32 [O, 1, 1, 1]: the scales or zero points of the first or the second half of a strip."""
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, split)))
    # g, group, h
    found = _load_unit(parts, layout).to(gl.int32).reshape(GROUPS_G, 8, layout.groups, 2)
    if layout.groups == 2:
        first, second = gl.split(found.permute(0, 1, 3, 2))
        found = gl.where(odd > 0, second, first)
    else:
        found = found.reshape(GROUPS_G, 8, 2)
    found_O = gl.convert_layout(found.permute(0, 2, 1).reshape(ROWS_G), of_rows, assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(found_O, 1), 2), 3)
