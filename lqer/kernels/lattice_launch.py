"""Host side of the kernels for lattice codes, and of the Hadamard rotations around them.

Shapes: M tokens, I in_features, O out_features, R rank, A blocks of a Hadamard matrix; P marks padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lqer.kernels.hadamard import hadamard_input_kernel, hadamard_output_kernel
from lqer.kernels.lattice import TILE_K, LatticeLayout, PackedLattice
from lqer.kernels.lattice_decode import TOKENS_AT_ONCE
from lqer.kernels.lattice_gemm import lattice_dequantize_kernel, lattice_product_kernel
from lqer.kernels.layout import ROW_PADDING, ROWS
from lqer.kernels.packed import PackedLinear
from lqer.kernels.runtime import launch_options
from lqer.transforms.hadamard import FLOAT16_HEADROOM, RandomHadamard, run_rotated, small_factor, small_order

LARGEST_BLOCK = 128  # outputs of a rotation, for one program
LARGEST_OUTER = 256  # rows of the outer factor: a program reads all blocks at once
HADAMARD_WARPS = 8
RANKS_AT_ONCE = 64  # in the input rotation
# In the product: Triton's shared memory for B must fit into 48 KB together with the table.
PRODUCT_RANKS_AT_ONCE = 32


@dataclass(frozen=True)
class LatticeLaunch:
    warps: int  # of a program, at most; each computes 16 rows
    span: int  # tiles of 128 columns for one program, at most; divides the layout's span
    registers: int | None = None  # of a thread, at most


# The fastest measured for one token at 8192x8192, and close to the fastest for more (docs/lab-notebook.md).
LAUNCH, LAUNCH_MORE = LatticeLaunch(4, 8, 80), LatticeLaunch(8, 8)
FEW_TOKENS = 2


@dataclass(frozen=True)
class HadamardFactors:
    """H of one length as O ⊗ H_block (hadamard.py): outer, O [A, A] in float32, and the size of a block."""

    outer: Tensor
    block: int

    @property
    def factor(self) -> float:
        """1 / sqrt(block), which normalises H_block."""
        return 1 / math.sqrt(self.block)


@lru_cache
def hadamard_factors(length: int, inverse: bool, device: torch.device) -> HadamardFactors:
    """The factors of H, or Hᵀ. Cached on the device, because a CUDA graph must not copy from the host."""
    small = small_order(length)
    power = length // small
    block = min(power, LARGEST_BLOCK)
    outer = small_factor(small)
    while power > block:
        # H_2n = H_2 ⊗ H_n: the inner factor of the outer one.
        outer = torch.kron(outer, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) / math.sqrt(2)
        power //= 2
    outer = outer.T if inverse else outer
    return HadamardFactors(outer.to(torch.float32).contiguous().to(device), block)


@lru_cache
def fits_hadamard(length: int) -> bool:
    """Whether the kernels rotate vectors of this length; torch rotates the others."""
    return length // min(length // small_order(length), LARGEST_BLOCK) <= LARGEST_OUTER


def rotates_in_kernels(packed: PackedLinear) -> bool:
    """Whether the kernels can apply the layer's rotations (also true if it has none)."""
    layout = packed.spec.layout
    return packed.input_signs_I is None or (fits_hadamard(layout.columns) and fits_hadamard(layout.rows))


def run_between_rotations(x_MI: Tensor, packed: PackedLinear, run: Callable[[Tensor, PackedLinear], Tensor]) -> Tensor:
    """y = `run` between the layer's rotations, if it has any, by torch."""
    if packed.input_signs_I is None or packed.output_signs_O is None:
        return run(x_MI, packed)
    hadamard = RandomHadamard(packed.input_signs_I, packed.output_signs_O)
    inner = replace(packed, bias_O=None, input_signs_I=None, output_signs_O=None)
    return run_rotated(x_MI, hadamard, packed.bias_O, lambda x: run(x, inner))


def headroom(dtype: torch.dtype) -> float:
    """x is divided by this before its rotation, and y multiplied by it after its own."""
    return FLOAT16_HEADROOM if dtype == torch.float16 else 1.0


def run_lattice(
    x_MI: Tensor,
    packed: PackedLinear,
    pdl: bool,
    launch: LatticeLaunch | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Up to 16 tokens by three kernels, or two without rotations; y [M, O] in `out_dtype`, by default that of x."""
    launch = launch or (LAUNCH if len(x_MI) <= FEW_TOKENS else LAUNCH_MORE)
    signs_I, signs_O = packed.input_signs_I, packed.output_signs_O
    y_dtype = out_dtype or x_MI.dtype
    if signs_I is None or signs_O is None:
        return _product(_prepare(x_MI, packed, None, pdl), packed, packed.bias_O, y_dtype, pdl, launch)
    tokens = _prepare(x_MI, packed, signs_I, pdl)
    y_MO = _product(tokens, packed, None, torch.float32, pdl, launch)
    m, n = y_MO.shape
    inverse, y_out = hadamard_factors(n, True, x_MI.device), x_MI.new_empty(m, n, dtype=y_dtype)
    blocks = n // inverse.block
    hadamard_output_kernel[blocks, m](
        y_MO, signs_O, inverse.outer, packed.bias_O, y_out, m, A=blocks, BLOCK_A=triton.next_power_of_2(blocks),
        B=inverse.block, factor=inverse.factor * headroom(x_MI.dtype), pdl=pdl, num_warps=HADAMARD_WARPS,
        **launch_options(pdl),
    )  # fmt: skip
    return y_out


@dataclass(frozen=True)
class _Tokens:
    """x' as the product reads it (lattice.py).

    bytes: int8 [M, 2, IP]. steps: int32 [M, tiles, 2]. projection: partial sums of x' A, float32 [tiles, M, RP].
    """

    bytes: Tensor
    steps: Tensor
    projection: Tensor | None


def _prepare(x_MI: Tensor, packed: PackedLinear, signs_I: Tensor | None, pdl: bool) -> _Tokens:
    (m, k), rank, tiles = x_MI.shape, packed.spec.rank, packed.spec.layout.padded_columns // TILE_K
    factors = None if signs_I is None else hadamard_factors(k, False, x_MI.device)
    blocks, block = (tiles, TILE_K) if factors is None else (k // factors.block, factors.block)
    tokens = _Tokens(
        x_MI.new_empty((m, 2, tiles * TILE_K), dtype=torch.int8),
        x_MI.new_empty((m, tiles, 2), dtype=torch.int32),
        x_MI.new_empty((tiles, m, rank), dtype=torch.float32) if rank else None,
    )
    hadamard_input_kernel[tiles, m](
        x_MI, signs_I, None if factors is None else factors.outer, packed.a_codes, tokens.bytes, tokens.steps,
        tokens.projection, m, k, x_MI.stride(0), rank=rank, tiles=tiles, A=blocks,
        BLOCK_A=triton.next_power_of_2(blocks), B=block, BLOCK_R=min(rank, RANKS_AT_ONCE),
        factor=1.0 if factors is None else factors.factor / headroom(x_MI.dtype), pdl=pdl,
        num_warps=HADAMARD_WARPS, **launch_options(pdl),
    )  # fmt: skip
    return tokens


def _product(
    tokens: _Tokens,
    packed: PackedLinear,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    pdl: bool,
    launch: LatticeLaunch,
) -> Tensor:
    """y [M, O] in `dtype`, of the tokens that `_prepare` returned."""
    weight, rank, m = packed.weight, packed.spec.rank, len(tokens.bytes)
    assert isinstance(weight, PackedLattice)
    layout = weight.layout
    warps = math.gcd(launch.warps, layout.padded_rows // ROWS)
    span = math.gcd(launch.span, layout.span)
    splits, tiles_n = layout.tiles // span, layout.padded_rows // (warps * ROWS)
    projection_splits = 0 if tokens.projection is None else len(tokens.projection)
    partial = tokens.steps.new_empty((splits, layout.rows, m), dtype=torch.float32) if splits > 1 else None
    y_MO = tokens.steps.new_empty((m, layout.rows), dtype=dtype)
    lattice_product_kernel[(tiles_n * splits,)](
        tokens.bytes, tokens.steps, weight.units, weight.table, weight.scales, packed.b_codes, tokens.projection,
        bias_O, partial, packed.workspace, y_MO, m, layout.rows, rank=rank, projection_splits=projection_splits,
        BLOCK_S=triton.next_power_of_2(max(projection_splits, 1)), tiles=layout.tiles, span=span, splits=splits,
        tiles_n=tiles_n, WARPS=warps, BLOCK_M=max(TOKENS_AT_ONCE, triton.next_power_of_2(m)),
        TOKENS=triton.next_power_of_2(m), BLOCK_R=_ranks_of_a_split(rank, splits), pdl=pdl, num_warps=warps,
        maxnreg=launch.registers, **launch_options(pdl),
    )  # fmt: skip
    return y_MO


def _ranks_of_a_split(rank: int, splits: int) -> int:
    """A power of two that divides a padded rank, so that all splits have about as many ranks."""
    return min(PRODUCT_RANKS_AT_ONCE, max(8, 1 << (rank // splits).bit_length() >> 1))


def dequantize_lattice(weight: PackedLattice, w_OI: Tensor) -> None:
    """Write the weight's values to w_OI."""
    layout: LatticeLayout = weight.layout
    lattice_dequantize_kernel[layout.padded_rows // ROW_PADDING, layout.tiles](
        weight.units, weight.table, weight.scales, w_OI, layout.rows, layout.columns, tiles=layout.tiles,
        BLOCK_N=ROW_PADDING, num_warps=4,
    )  # fmt: skip
