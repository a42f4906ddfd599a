"""Host side of stream_gemm.py: four-bit codes and 33 to 128 tokens.

Shapes: M tokens, I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lqer.kernels import runtime
from lqer.kernels.gluon.decode import COLUMNS
from lqer.kernels.gluon.launch import descriptor, prepare
from lqer.kernels.gluon.stream_decode import ROWS, WARPS, groups_held, scales_per_unit
from lqer.kernels.gluon.stream_gemm import stream_kernel, turns_of
from lqer.kernels.input_launch import dense_rows
from lqer.kernels.layout.codes import Layout
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.packed import PROJECTION_COUNTERS, PackedLinear
from lqer.kernels.tuning import StreamLaunch

ROW_GROUP = 16
REGISTERS, THREADS = 1 << 16, 256  # of a multiprocessor; of a program, the copier's warp counting as four


def run_stream(
    x_MI: Tensor, packed: PackedLinear, launch: StreamLaunch, out_dtype: torch.dtype | None = None
) -> Tensor:
    """y [M, O] in `out_dtype`, by default that of x."""
    layout = packed.spec.layout
    assert isinstance(layout, Layout | GroupLayout)
    given = dense_rows(x_MI)
    prepared = prepare(given, packed, out_dtype)
    (m, n), block_m = prepared.y_MO.shape, launch.block_m
    tiles_m = -(-m // block_m)
    total = tiles_m * -(-n // ROWS) * turns_of(layout.compiled)
    programs = min(launch.programs, total)
    partial = given.new_empty((programs, 2, ROWS * block_m), dtype=torch.float32)
    words, _, scales, zeros = packed.weight.parts
    row_groups, steps = words.shape[0], layout.padded_columns // COLUMNS
    if scales.element_size() == 2:
        scales = scales.view(torch.int16)
    pdl = runtime.supports_pdl(given)
    stream_kernel[(programs,)](
        descriptor(prepared.x_MI, [block_m, COLUMNS]),
        descriptor(words.view(row_groups, steps * 8, 32), [ROWS // ROW_GROUP, 8, 32]),
        _units(scales, layout),
        _units(scales if zeros is None else zeros, layout),
        prepared.bias_O, partial, packed.workspace[PROJECTION_COUNTERS:], prepared.y_MO, m, n, tiles_m, total,
        layout=layout.compiled, stages=launch.stages, adds=prepared.adds, pdl=pdl, num_warps=WARPS,
        maxnreg=REGISTERS // (launch.at_once * THREADS) // 8 * 8, **runtime.launch_options(pdl),
    )  # fmt: skip
    return prepared.y_MO


def _units(part: Tensor, layout: Layout | GroupLayout) -> TensorDescriptor:
    """Scales or zero points."""
    count = scales_per_unit(layout.compiled)
    return descriptor(part.view(len(part), -1, count), [groups_held(layout.compiled, part.element_size()), 1, count])
