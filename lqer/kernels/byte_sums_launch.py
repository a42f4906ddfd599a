"""Host side of the product of few tokens with trellis codes of table "bytes".

Shapes: M tokens, I in_features, O out_features, R rank; P marks padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lqer.kernels.byte_sums import TOKENS_AT_ONCE
from lqer.kernels.byte_sums_gemm import byte_sums_dequantize_kernel, byte_sums_product_kernel
from lqer.kernels.hadamard_launch import Tokens, ranks_of_a_split, run_rotated_product
from lqer.kernels.joint import segment_numbers
from lqer.kernels.layout import ROWS
from lqer.kernels.packed import PackedLinear
from lqer.kernels.runtime import launch_options
from lqer.kernels.tiles import TILE_K
from lqer.kernels.trellis import PackedTrellis, TrellisLayout


@dataclass(frozen=True)
class ByteSumsLaunch:
    groups: int  # of 16 rows, for one warp
    warps_n: int  # of a program, along the rows
    warps_k: int  # of a program, at most, along the columns
    splits: int = 1  # programs along the columns, at most
    registers: int | None = None  # of a thread, at most
    early: bool = False  # whether a thread loads its tokens a tile ahead, as it does its codes
    late: bool = False  # see run_rotated_product


LAUNCH = ByteSumsLaunch(2, 1, 8, registers=64, late=True)
# With more tiles, two programs along the columns are faster.
TILES_OF_ONE = 64
DEQUANTIZE_WARPS = 4


def run_byte_sums(
    x_MI: Tensor,
    packed: PackedLinear,
    pdl: bool,
    launch: ByteSumsLaunch | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Up to four tokens by three kernels, or two without rotations; y [M, O] in `out_dtype`, by default that of x."""
    m, tiles = len(x_MI), packed.spec.layout.padded_columns // TILE_K
    launch = launch or (LAUNCH if tiles <= TILES_OF_ONE else replace(LAUNCH, splits=2))
    assert m <= TOKENS_AT_ONCE
    empty = (
        x_MI.new_empty((m, 2, tiles * TILE_K), dtype=torch.int8),
        x_MI.new_empty((m, tiles), dtype=torch.float32),
    )

    def product(tokens: Tokens, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _product(tokens, packed, bias_O, dtype, pdl, launch)

    return run_rotated_product(x_MI, packed, empty, product, out_dtype or x_MI.dtype, pdl, launch.late)


def _product(
    tokens: Tokens,
    packed: PackedLinear,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    pdl: bool,
    launch: ByteSumsLaunch,
) -> Tensor:
    """y [M, O] in `dtype`."""
    weight, spec, m = packed.weight, packed.spec, len(tokens.values)
    assert isinstance(weight, PackedTrellis)
    layout: TrellisLayout = weight.layout
    # Of uneven parts the last ones have fewer tiles, or none.
    warps_k = min(launch.warps_k, 1 << layout.tiles.bit_length() - 1)
    splits = min(launch.splits, layout.tiles // warps_k)
    tiles_n = -(-layout.rows // (launch.groups * launch.warps_n * ROWS))
    partial = tokens.steps.new_empty((splits, layout.rows, m)) if splits > 1 else None
    y_MO = tokens.steps.new_empty((m, layout.rows), dtype=dtype)
    byte_sums_product_kernel[(tiles_n * splits,)](
        tokens.values, tokens.steps, weight.words, weight.scales, packed.b_codes, tokens.projection, bias_O,
        segment_numbers(spec, y_MO.device), partial, packed.workspace, y_MO, m, layout.rows, tiles_n,
        layout=layout.compiled, rank=spec.rank, own_rank=spec.own_rank, projection_splits=tokens.projection_splits,
        BLOCK_S=triton.next_power_of_2(max(tokens.projection_splits, 1)), span=-(-layout.tiles // (warps_k * splits)),
        splits=splits, warps_n=launch.warps_n, warps_k=warps_k, groups=launch.groups, early=launch.early,
        TOKENS=triton.next_power_of_2(m), BLOCK_R=ranks_of_a_split(spec.own_rank, splits), pdl=pdl,
        num_warps=launch.warps_n * warps_k, maxnreg=launch.registers, **launch_options(pdl),
    )  # fmt: skip
    return y_MO


def dequantize_byte_sums(weight: PackedTrellis, w_OI: Tensor) -> None:
    """Write the weight's values to w_OI."""
    layout = weight.layout
    byte_sums_dequantize_kernel[-(-layout.rows // (ROWS * DEQUANTIZE_WARPS)), layout.tiles](
        weight.words, weight.scales, w_OI, layout.rows, layout.columns, layout=layout.compiled, WARPS=DEQUANTIZE_WARPS,
        num_warps=DEQUANTIZE_WARPS,
    )  # fmt: skip
