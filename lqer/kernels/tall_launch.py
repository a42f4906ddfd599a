"""Host side of tall_gemm.py: four-bit codes and more than 16 tokens.

Shapes: M tokens, I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lqer.kernels import runtime
from lqer.kernels.groups import GroupLayout
from lqer.kernels.input_launch import dense_rows, round_activations
from lqer.kernels.layout import Layout
from lqer.kernels.packed import PROJECTION_COUNTERS, PackedLinear
from lqer.kernels.tall_decode import COLUMNS, ROWS, WARPS
from lqer.kernels.tall_gemm import tall_kernel
from lqer.kernels.tuning import TallLaunch

BITS = 4
GROUPS = 2  # of a strip, at most
SMALL_TILE, SMALL_REGISTERS = 64, 128  # two programs of so few tokens share a multiprocessor
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def fits_tall(packed: PackedLinear, x: Tensor) -> bool:
    """Whether the kernel takes this linear, MXINT or groups of at least 128 of four bits and no branch, on x's GPU."""
    layout = packed.spec.layout
    if isinstance(layout, GroupLayout):
        fits = layout.bits == BITS and layout.groups <= GROUPS
    else:
        # MXINT is decoded to bfloat16.
        four_bits = isinstance(layout, Layout) and layout.exponents and layout.bits == BITS
        fits = four_bits and packed.dtype == torch.bfloat16
    return fits and not packed.spec.rank and runtime.is_hopper(x)


def run_tall(x_MI: Tensor, packed: PackedLinear, launch: TallLaunch, out_dtype: torch.dtype | None = None) -> Tensor:
    """y [M, O] in `out_dtype`, by default that of x."""
    layout = packed.spec.layout
    assert isinstance(layout, Layout | GroupLayout)
    given = dense_rows(x_MI)
    x_MI = round_activations(given, packed.spec, ordered=True)
    (m, n), block_m = (len(given), layout.rows), launch.block_m
    y_MO = given.new_empty(m, n, dtype=out_dtype)
    tiles_n = -(-n // ROWS)
    rest = tiles_n * -(-m // block_m) - launch.whole
    partial = None
    if launch.splits > 1:
        partial = given.new_empty((rest, launch.splits, ROWS * block_m), dtype=torch.float32)
    block = [block_m, COLUMNS]
    shared = gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[given.dtype])
    words, _, scales, zeros = packed.weight.parts
    pdl = runtime.supports_pdl(given)
    limit = {"maxnreg": SMALL_REGISTERS} if block_m <= SMALL_TILE else {}
    tall_kernel[(launch.whole + rest * launch.splits,)](
        TensorDescriptor.from_tensor(x_MI, block, shared), words, scales, zeros, packed.bias_O, partial,
        packed.workspace[PROJECTION_COUNTERS:], y_MO, m, n, tiles_n, launch.whole, layout=layout.compiled,
        BLOCK_M=block_m, splits=launch.splits, stages=launch.stages, pdl=pdl, num_warps=WARPS, **limit,
        **runtime.launch_options(pdl),
    )  # fmt: skip
    return y_MO
