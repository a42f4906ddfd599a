"""Host side of the product of 5 to 32 tokens with lattice codes.

Shapes: M tokens, I in_features, O out_features, R rank, S partial sums; P marks padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lqer.kernels.fusion import UNFUSED, Fused
from lqer.kernels.halves import TOKENS_AT_ONCE
from lqer.kernels.joint import segment_numbers
from lqer.kernels.lattice.halves_gemm import lattice_halves_kernel
from lqer.kernels.layout.codes import ROWS
from lqer.kernels.layout.lattice import LatticeLayout, PackedLattice
from lqer.kernels.packed import PackedLinear
from lqer.kernels.rotations.launch import Tokens, rotate_inputs, rotate_outputs
from lqer.kernels.runtime import launch_options, multiprocessors

RANKS_AT_ONCE = 16  # as many as a tensor core multiplies
# Of a program: outputs of more would not fit into 48 KB of shared memory beside the table.
MOST_ROWS = 128


@dataclass(frozen=True)
class LatticeHalvesLaunch:
    """Raises ValueError for more than 128 rows a program."""

    groups: int  # of 16 rows, for one warp
    warps_n: int  # of a program, along the rows
    warps_k: int  # of a program, along the columns; a divisor of it that divides the tiles
    splits: int = 1  # programs along the columns, at most
    registers: int | None = None  # of a thread, at most

    def __post_init__(self) -> None:
        rows = self.groups * self.warps_n * ROWS
        if rows > MOST_ROWS:
            raise ValueError(f"a program has at most {MOST_ROWS} rows, found {rows}")


# Beside the table there is shared memory for the outputs of so many tokens.
AT_ONCE = 32
# Programs that a multiprocessor has to hold until their number decides, and not latencies.
BUSY = 2
# What a program takes besides its tiles, in tiles: its first codes and the end, and for each so many tokens the sums of
# a split, once by itself and once by the program that adds them. With these the rule gives the fastest splits measured.
OVERHEAD, TOKENS_OF_OVERHEAD = 2, 32
# Registers that let four programs of four warps share a multiprocessor.
REGISTERS = 128


@lru_cache
def lattice_halves_launch(layout: LatticeLayout, tokens: int, multiprocessors: int) -> LatticeHalvesLaunch:
    """The launch for so many tokens, with the splits of K with which the multiprocessors have least to do."""
    launch = LatticeHalvesLaunch(2, 4, 1, 1, REGISTERS)
    rows = -(-layout.rows // (launch.groups * launch.warps_n * ROWS))

    def time(splits: int) -> float:
        sums = tokens / TOKENS_OF_OVERHEAD
        programs = max(BUSY, -(-rows * splits // multiprocessors))
        return programs * (layout.tiles // splits + OVERHEAD + sums) + splits * sums

    fitting = [splits for splits in range(1, layout.tiles + 1) if layout.tiles % splits == 0]
    return replace(launch, splits=min(fitting, key=time))


def run_lattice_halves(
    x_MI: Tensor,
    packed: PackedLinear,
    pdl: bool,
    launch: LatticeHalvesLaunch | None = None,
    out_dtype: torch.dtype | None = None,
    fused: Fused = UNFUSED,
) -> Tensor:
    """Up to 32 tokens by three kernels, or two without rotations; y [M, O] in `out_dtype`, by default that of x."""
    m, layout = len(x_MI), packed.spec.layout
    assert isinstance(layout, LatticeLayout)
    assert m <= AT_ONCE
    launch = launch or lattice_halves_launch(layout, m, multiprocessors(x_MI.device))
    # The last block may have fewer tokens than a tensor core multiplies: products of none are not stored.
    tokens = rotate_inputs(x_MI, packed, "halves", pdl, block_of(m), fused)
    dtype = out_dtype or x_MI.dtype
    if packed.input_signs_I is None:
        return _product(tokens, packed, packed.bias_O, dtype, pdl, launch)
    y_SMO = _product(tokens, packed, None, torch.float32, pdl, launch).unsqueeze(0)
    return rotate_outputs(y_SMO, packed, dtype, pdl, fused.residual_MO)


def block_of(tokens: int) -> int:
    """Tokens of a program."""
    return max(TOKENS_AT_ONCE, triton.next_power_of_2(tokens))


def _product(
    tokens: Tokens,
    packed: PackedLinear,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    pdl: bool,
    launch: LatticeHalvesLaunch,
) -> Tensor:
    """y [M, O] in `dtype`."""
    weight, spec, m = packed.weight, packed.spec, len(tokens.steps)
    assert isinstance(weight, PackedLattice)
    layout = weight.layout
    warps_k = math.gcd(launch.warps_k, layout.tiles)
    spans = layout.tiles // warps_k
    splits = next(splits for splits in range(min(launch.splits, spans), 0, -1) if spans % splits == 0)
    tiles_n = -(-layout.rows // (launch.groups * launch.warps_n * ROWS))
    partial = tokens.steps.new_empty((splits, layout.rows, m)) if splits > 1 else None
    y_MO = tokens.steps.new_empty((m, layout.rows), dtype=dtype)
    lattice_halves_kernel[(tiles_n * splits,)](
        tokens.values, tokens.steps, weight.units, weight.table, weight.scales, packed.b_codes, tokens.projection,
        bias_O, segment_numbers(spec, y_MO.device), partial, packed.workspace, y_MO, m, layout.rows, tiles_n,
        layout=layout.compiled, rank=spec.rank, own_rank=spec.own_rank, projection_splits=tokens.projection_splits,
        BLOCK_S=triton.next_power_of_2(max(tokens.projection_splits, 1)), span=spans // splits, splits=splits,
        warps_n=launch.warps_n, warps_k=warps_k, groups=launch.groups, BLOCK_M=block_of(m),
        BLOCK_R=min(RANKS_AT_ONCE, max(spec.own_rank, 1)), pdl=pdl, num_warps=launch.warps_n * warps_k,
        maxnreg=launch.registers, **launch_options(pdl),
    )  # fmt: skip
    return y_MO
