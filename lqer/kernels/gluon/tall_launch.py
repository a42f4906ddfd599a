"""Host side of tall_gemm.py: four-bit codes and more than 128 tokens.

Shapes: M tokens, I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.kernels import runtime
from lqer.kernels.gluon.decode import COLUMNS
from lqer.kernels.gluon.launch import descriptor, prepare
from lqer.kernels.gluon.tall_decode import ROWS, WARPS
from lqer.kernels.gluon.tall_gemm import tall_kernel
from lqer.kernels.input_launch import dense_rows
from lqer.kernels.layout.codes import Layout
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.packed import PROJECTION_COUNTERS, PackedLinear
from lqer.kernels.tuning import TallLaunch


def run_tall(x_MI: Tensor, packed: PackedLinear, launch: TallLaunch, out_dtype: torch.dtype | None = None) -> Tensor:
    """y [M, O] in `out_dtype`, by default that of x."""
    layout = packed.spec.layout
    assert isinstance(layout, Layout | GroupLayout)
    given = dense_rows(x_MI)
    prepared = prepare(given, packed, out_dtype)
    (m, n), block_m = prepared.y_MO.shape, launch.block_m
    tiles_n = -(-n // ROWS)
    rest = tiles_n * -(-m // block_m) - launch.whole
    partial = None
    if launch.splits > 1:
        partial = given.new_empty((rest, launch.splits, ROWS * block_m), dtype=torch.float32)
    words, _, scales, zeros = packed.weight.parts
    pdl = runtime.supports_pdl(given)
    tall_kernel[(launch.whole + rest * launch.splits,)](
        descriptor(prepared.x_MI, [block_m, COLUMNS]), words, scales, zeros, prepared.bias_O, partial,
        packed.workspace[PROJECTION_COUNTERS:], prepared.y_MO, m, n, tiles_n, launch.whole, layout=layout.compiled,
        BLOCK_M=block_m, splits=launch.splits, long=launch.long, stages=launch.stages, adds=prepared.adds, pdl=pdl,
        num_warps=WARPS, **runtime.launch_options(pdl),
    )  # fmt: skip
    return prepared.y_MO
