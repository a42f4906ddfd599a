"""Host side of the kernels for lattice codes and for linears in a randomized Hadamard basis.

Shapes: M tokens, N out_features, K in_features, R rank; P marks padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lqer.kernels.hadamard import restore_tokens_kernel, transform_tokens_kernel
from lqer.kernels.lattice import TILE_K, LatticeLayout, PackedLattice
from lqer.kernels.lattice_decode import TOKENS_AT_ONCE
from lqer.kernels.lattice_gemm import lattice_expand_kernel, lattice_product_kernel
from lqer.kernels.layout import ROW_PADDING, ROWS
from lqer.kernels.packed import PackedLinear
from lqer.kernels.runtime import launch_options
from lqer.transforms.hadamard import FLOAT16_HEADROOM, RandomHadamard, run_rotated, small_factor, small_order

LATTICE_TOKENS = 16
LARGEST_BLOCK = 128  # of a transform's outputs, for one program
LARGEST_OUTER = 256  # rows of the outer factor: a program reads all blocks at once
TRANSFORM_WARPS = 8
RANKS_AT_ONCE = 64  # of a transform
# Of a product: with the table, what Triton needs of shared memory to lay out B anew has to stay within 48 KB.
PRODUCT_RANKS_AT_ONCE = 32


@dataclass(frozen=True)
class LatticeLaunch:
    warps: int  # of a program, at most; each has 16 rows
    span: int  # tiles of 128 columns, for one program; at most those of the layout
    registers: int | None = None  # of a thread, at most


# Of those that were measured at 8192x8192 (docs/lab-notebook.md) the fastest for one token, and nearly that for more.
LAUNCH, LAUNCH_MORE = LatticeLaunch(4, 8, 80), LatticeLaunch(8, 8)
FEW_TOKENS = 2


@dataclass(frozen=True)
class Transform:
    """H of one length as blocks (hadamard.py): outer (A, A) float32, the size of a block, and 1 / sqrt of it."""

    outer: Tensor
    block: int

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.block)


@lru_cache
def transform(length: int, inverse: bool, device: torch.device) -> Transform:
    """Kept on the device: in a CUDA graph nothing may be copied there."""
    small = small_order(length)
    power = length // small
    block = min(power, LARGEST_BLOCK)
    outer = small_factor(small)
    while power > block:
        # H_2n = H_2 ⊗ H_n: the inner factor of the outer one.
        outer = torch.kron(outer, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) / math.sqrt(2)
        power //= 2
    outer = outer.T if inverse else outer
    return Transform(outer.to(torch.float32).contiguous().to(device), block)


@lru_cache
def fits_transform(length: int) -> bool:
    """Whether the kernels transform vectors of this length; others leave that to torch."""
    return length // min(length // small_order(length), LARGEST_BLOCK) <= LARGEST_OUTER


def runs_in_kernels(packed: PackedLinear) -> bool:
    """Whether the basis of a linear, if it has one, is that of kernels."""
    layout = packed.spec.layout
    return packed.input_signs_K is None or (fits_transform(layout.columns) and fits_transform(layout.rows))


def run_in_basis(x_MK: Tensor, packed: PackedLinear, run: Callable[[Tensor, PackedLinear], Tensor]) -> Tensor:
    """What `run` computes in the basis of the linear, if it has one, transforms by torch."""
    if packed.input_signs_K is None or packed.output_signs_N is None:
        return run(x_MK, packed)
    basis = RandomHadamard(packed.input_signs_K, packed.output_signs_N)
    inner = replace(packed, bias_N=None, input_signs_K=None, output_signs_N=None)
    return run_rotated(x_MK, basis, packed.bias_N, lambda x: run(x, inner))


def headroom(dtype: torch.dtype) -> float:
    """What x is divided by before it is transformed, and y multiplied by after that."""
    return FLOAT16_HEADROOM if dtype == torch.float16 else 1.0


def run_lattice(
    x_MK: Tensor,
    packed: PackedLinear,
    chained: bool,
    launch: LatticeLaunch | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Up to 16 tokens by three kernels, two where there is no basis; y in `out_dtype`, by default that of x."""
    launch = launch or (LAUNCH if len(x_MK) <= FEW_TOKENS else LAUNCH_MORE)
    signs_K, signs_N = packed.input_signs_K, packed.output_signs_N
    y_dtype = out_dtype or x_MK.dtype
    if signs_K is None or signs_N is None:
        return _product(_prepare(x_MK, packed, None, chained), packed, packed.bias_N, y_dtype, chained, launch)
    tokens = _prepare(x_MK, packed, signs_K, chained)
    y_MN = _product(tokens, packed, None, torch.float32, chained, launch)
    m, n = y_MN.shape
    back, y_out = transform(n, True, x_MK.device), x_MK.new_empty(m, n, dtype=y_dtype)
    blocks = n // back.block
    restore_tokens_kernel[blocks, m](
        y_MN, signs_N, back.outer, packed.bias_N, y_out, m, A=blocks, BLOCK_A=triton.next_power_of_2(blocks),
        B=back.block, factor=back.factor * headroom(x_MK.dtype), chained=chained, num_warps=TRANSFORM_WARPS,
        **launch_options(chained),
    )  # fmt: skip
    return y_out


@dataclass(frozen=True)
class _Tokens:
    """x' as the product reads it (lattice.py): bytes [M, 2, KP], int32 steps [M, tiles, 2], and the parts of x' A."""

    bytes: Tensor
    steps: Tensor
    projection: Tensor | None  # float32 [tiles, M, RP]


def _prepare(x_MK: Tensor, packed: PackedLinear, signs_K: Tensor | None, chained: bool) -> _Tokens:
    (m, k), rank, tiles = x_MK.shape, packed.spec.rank, packed.spec.layout.padded_columns // TILE_K
    into = None if signs_K is None else transform(k, False, x_MK.device)
    blocks, block = (tiles, TILE_K) if into is None else (k // into.block, into.block)
    tokens = _Tokens(
        x_MK.new_empty((m, 2, tiles * TILE_K), dtype=torch.int8),
        x_MK.new_empty((m, tiles, 2), dtype=torch.int32),
        x_MK.new_empty((tiles, m, rank), dtype=torch.float32) if rank else None,
    )
    transform_tokens_kernel[tiles, m](
        x_MK, signs_K, None if into is None else into.outer, packed.a_codes, tokens.bytes, tokens.steps,
        tokens.projection, m, k, x_MK.stride(0), rank=rank, tiles=tiles, A=blocks,
        BLOCK_A=triton.next_power_of_2(blocks), B=block, BLOCK_R=min(rank, RANKS_AT_ONCE),
        factor=1.0 if into is None else into.factor / headroom(x_MK.dtype), chained=chained,
        num_warps=TRANSFORM_WARPS, **launch_options(chained),
    )  # fmt: skip
    return tokens


def _product(
    tokens: _Tokens,
    packed: PackedLinear,
    bias_N: Tensor | None,
    dtype: torch.dtype,
    chained: bool,
    launch: LatticeLaunch,
) -> Tensor:
    """y [M, N] in `dtype`, of what `_prepare` returned."""
    weight, rank, m = packed.weight, packed.spec.rank, len(tokens.bytes)
    assert isinstance(weight, PackedLattice)
    layout = weight.layout
    warps = math.gcd(launch.warps, layout.padded_rows // ROWS)
    span = math.gcd(launch.span, layout.span)
    splits, tiles_n = layout.tiles // span, layout.padded_rows // (warps * ROWS)
    slabs = 0 if tokens.projection is None else len(tokens.projection)
    partial = tokens.steps.new_empty((splits, layout.rows, m), dtype=torch.float32) if splits > 1 else None
    y_MN = tokens.steps.new_empty((m, layout.rows), dtype=dtype)
    lattice_product_kernel[(tiles_n * splits,)](
        tokens.bytes, tokens.steps, weight.units, weight.table, weight.scales, packed.b_codes, tokens.projection,
        bias_N, partial, packed.workspace, y_MN, m, layout.rows, rank=rank, slabs=slabs,
        BLOCK_S=triton.next_power_of_2(max(slabs, 1)), tiles=layout.tiles, span=span, splits=splits, tiles_n=tiles_n,
        WARPS=warps, BLOCK_M=max(TOKENS_AT_ONCE, triton.next_power_of_2(m)), TOKENS=triton.next_power_of_2(m),
        BLOCK_R=_ranks_of_a_split(rank, splits), chained=chained, num_warps=warps,
        maxnreg=launch.registers, **launch_options(chained),
    )  # fmt: skip
    return y_MN


def _ranks_of_a_split(rank: int, splits: int) -> int:
    """A power of two that divides a padded rank, so that every split has about as many."""
    return min(PRODUCT_RANKS_AT_ONCE, max(8, 1 << (rank // splits).bit_length() >> 1))


def expand_lattice(weight: PackedLattice, w_NK: Tensor) -> None:
    """Decode a weight into w_NK."""
    layout: LatticeLayout = weight.layout
    lattice_expand_kernel[layout.padded_rows // ROW_PADDING, layout.tiles](
        weight.units,
        weight.table,
        weight.scales,
        w_NK,
        layout.rows,
        layout.columns,
        tiles=layout.tiles,
        BLOCK_N=ROW_PADDING,
        num_warps=4,
    )
