"""Host side of the kernels for lattice codes.

Shapes: M tokens, I in_features, O out_features, R rank; P marks padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lqer.kernels.fusion import UNFUSED, Fused
from lqer.kernels.joint import segment_numbers
from lqer.kernels.lattice.decode import TOKENS_AT_ONCE
from lqer.kernels.lattice.gemm import lattice_dequantize_kernel, lattice_product_kernel
from lqer.kernels.layout.codes import ROW_PADDING, ROWS
from lqer.kernels.layout.lattice import LatticeLayout, PackedLattice
from lqer.kernels.packed import PackedLinear
from lqer.kernels.rotations.launch import Tokens, ranks_of_a_split, run_rotated_product
from lqer.kernels.runtime import launch_options


@dataclass(frozen=True)
class LatticeLaunch:
    warps: int  # of a program, at most; each computes 16 rows
    span: int  # tiles of 128 columns for one program, at most; divides the layout's span
    registers: int | None = None  # of a thread, at most


# The fastest measured for one token at 8192x8192, and for four at two shapes (docs/lab-notebook.md).
LAUNCH, LAUNCH_MORE = LatticeLaunch(4, 8, 80), LatticeLaunch(8, 8)
FEW_TOKENS = 2


def run_lattice(
    x_MI: Tensor,
    packed: PackedLinear,
    pdl: bool,
    launch: LatticeLaunch | None = None,
    out_dtype: torch.dtype | None = None,
    fused: Fused = UNFUSED,
) -> Tensor:
    """Up to four tokens by three kernels, or two without rotations; y [M, O] in `out_dtype`, by default that of x."""
    launch = launch or (LAUNCH if len(x_MI) <= FEW_TOKENS else LAUNCH_MORE)
    assert len(x_MI) <= TOKENS_AT_ONCE

    def product(tokens: Tokens, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _product(tokens, packed, bias_O, dtype, pdl, launch)

    return run_rotated_product(x_MI, packed, "integers", product, out_dtype or x_MI.dtype, pdl, fused)


def _product(
    tokens: Tokens,
    packed: PackedLinear,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    pdl: bool,
    launch: LatticeLaunch,
) -> Tensor:
    """y [M, O] in `dtype`."""
    weight, spec, m = packed.weight, packed.spec, len(tokens.values)
    assert isinstance(weight, PackedLattice)
    layout = weight.layout
    warps = math.gcd(launch.warps, layout.padded_rows // ROWS)
    span = math.gcd(launch.span, layout.span)
    splits, tiles_n = layout.tiles // span, layout.padded_rows // (warps * ROWS)
    partial = tokens.steps.new_empty((splits, layout.rows, m), dtype=torch.float32) if splits > 1 else None
    y_MO = tokens.steps.new_empty((m, layout.rows), dtype=dtype)
    lattice_product_kernel[(tiles_n * splits,)](
        tokens.values, tokens.steps, weight.units, weight.table, weight.scales, packed.b_codes, tokens.projection,
        bias_O, segment_numbers(spec, y_MO.device), partial, packed.workspace, y_MO, m, layout.rows, rank=spec.rank,
        own_rank=spec.own_rank, projection_splits=tokens.projection_splits,
        BLOCK_S=triton.next_power_of_2(max(tokens.projection_splits, 1)), tiles=layout.tiles, span=span,
        splits=splits, tiles_n=tiles_n, WARPS=warps, TOKENS=triton.next_power_of_2(m),
        BLOCK_R=ranks_of_a_split(spec.own_rank, splits), pdl=pdl, num_warps=warps,
        maxnreg=launch.registers, **launch_options(pdl),
    )  # fmt: skip
    return y_MO


def dequantize_lattice(weight: PackedLattice, w_OI: Tensor) -> None:
    """Write the weight's values to w_OI."""
    layout: LatticeLayout = weight.layout
    lattice_dequantize_kernel[layout.padded_rows // ROW_PADDING, layout.tiles](
        weight.units, weight.table, weight.scales, w_OI, layout.rows, layout.columns, tiles=layout.tiles,
        BLOCK_N=ROW_PADDING, num_warps=4,
    )  # fmt: skip
