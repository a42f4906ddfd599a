"""Device functions in Gluon that load four-bit codes, integer groups or MXINT, for tall_gemm.py.

Its tensor cores take 128 rows of a step from the registers of eight warps (decode.py).

Shapes: O rows, J words of a row in a step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lqer.kernels.gluon.decode import is_grouped, steps_of

ROWS, WARPS = 128, 8
ROWS_G, WARPS_G = gl.constexpr(ROWS), gl.constexpr(WARPS)


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
