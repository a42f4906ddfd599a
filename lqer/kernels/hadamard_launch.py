"""Host side of what surrounds a product with lattice or trellis codes: Hadamard rotations, x A, and the parts of B.

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
from lqer.kernels.packed import PackedLinear
from lqer.kernels.runtime import launch_options
from lqer.kernels.spec import Spec
from lqer.kernels.tiles import TILE_K
from lqer.transforms.hadamard import FLOAT16_HEADROOM, run_rotated
from lqer.transforms.hadamard_factors import small_order, two_factors

LARGEST_BLOCK = 128  # outputs of a rotation of one token, for one program
LARGEST_OUTER = 256  # rows of the outer factor: a program reads all blocks at once
HADAMARD_WARPS = 8
RANKS_AT_ONCE = 64  # in the input rotation
# In the product: Triton's shared memory for B must fit into 48 KB together with the table of lattice codes.
PRODUCT_RANKS_AT_ONCE = 32


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
def hadamard_factors(length: int, inverse: bool, device: torch.device, largest: int = LARGEST_BLOCK) -> HadamardFactors:
    """The factors of H, or Hᵀ, with a block of at most `largest`.

    Cached on the device, because a CUDA graph must not copy from the host.
    """
    outer, inner = two_factors(length, largest)
    outer = outer.T if inverse else outer
    return HadamardFactors(outer.to(torch.float32).contiguous().to(device), len(inner))


@dataclass(frozen=True)
class InverseFactors:
    """Hᵀ of one length, or of several side by side with blocks of one size: what the rotation of outputs reads.

    outer: Oᵀ [A, A] in float32, or those of all, flat and one after the other. places: see `output_place` of
    hadamard.py, or None. count: blocks of outputs.
    """

    outer: Tensor
    places: Tensor | None
    block: int
    count: int

    @property
    def factor(self) -> float:
        """1 / sqrt(block), which normalises H_block."""
        return 1 / math.sqrt(self.block)


@lru_cache
def inverse_factors(spec: Spec, device: torch.device) -> InverseFactors:
    """The factors of the inverse rotation of a layer's outputs; cached as those of `hadamard_factors`."""
    if not spec.segments:
        rows = spec.layout.rows
        factors = hadamard_factors(rows, True, device)
        return InverseFactors(factors.outer, None, factors.block, rows // factors.block)
    block = min(LARGEST_BLOCK, *(segment.rows // small_order(segment.rows) for segment in spec.segments))
    outers: dict[int, Tensor] = {}
    offsets: dict[int, int] = {}
    places = []
    for segment in spec.segments:
        blocks = segment.rows // block
        if segment.rows not in outers:
            offsets[segment.rows] = sum(outer.numel() for outer in outers.values())
            outers[segment.rows] = hadamard_factors(segment.rows, True, device, block).outer
        row = offsets[segment.rows]
        places += [(segment.start, blocks, row + i * blocks, segment.start + i * block) for i in range(blocks)]
    outer = torch.cat([outer.flatten() for outer in outers.values()])
    return InverseFactors(outer, torch.tensor(places, dtype=torch.int32, device=device), block, len(places))


@lru_cache
def fits_hadamard(length: int) -> bool:
    """Whether the kernels rotate vectors of this length; torch rotates the others."""
    return length // min(length // small_order(length), LARGEST_BLOCK) <= LARGEST_OUTER


def rotates_in_kernels(packed: PackedLinear) -> bool:
    """Whether the kernels can apply the layer's rotations (also true if it has none)."""
    if packed.input_signs_I is None:
        return True
    spec = packed.spec
    if not spec.segments:
        return fits_hadamard(spec.layout.columns) and fits_hadamard(spec.layout.rows)
    lengths = [segment.rows for segment in spec.segments]
    block = min(LARGEST_BLOCK, *(length // small_order(length) for length in lengths))
    return fits_hadamard(spec.layout.columns) and max(lengths) // block <= LARGEST_OUTER


def run_between_rotations(x_MI: Tensor, packed: PackedLinear, run: Callable[[Tensor, PackedLinear], Tensor]) -> Tensor:
    """y = `run` between the layer's rotations, if it has any, by torch."""
    rotation = packed.rotation
    if rotation is None:
        return run(x_MI, packed)
    inner = replace(packed, bias_O=None, input_signs_I=None, output_signs_O=None)
    return run_rotated(x_MI, rotation, packed.bias_O, lambda x: run(x, inner))


def headroom(dtype: torch.dtype) -> float:
    """x is divided by this before its rotation, and y multiplied by it after its own."""
    return FLOAT16_HEADROOM if dtype == torch.float16 else 1.0


@dataclass(frozen=True)
class Tokens:
    """x' as a product reads it, of lattice codes (lattice.py), of trellis codes (trellis.py, byte_sums.py), or of
    either (halves.py).

    values: int8 [M, 2, IP] or float16 [M, IP]. steps: int32 [M, tiles, 2], float32 [M, tiles] or [M]. projection:
    partial sums of x' A, float32 [splits, M, RP], or None.
    """

    values: Tensor
    steps: Tensor
    projection: Tensor | None

    @property
    def projection_splits(self) -> int:
        return 0 if self.projection is None else len(self.projection)


Product = Callable[[Tokens, Tensor | None, torch.dtype], Tensor]


def run_rotated_product(
    x_MI: Tensor,
    packed: PackedLinear,
    empty: tuple[Tensor, Tensor],
    product: Product,
    dtype: torch.dtype,
    pdl: bool,
    late: bool = False,
) -> Tensor:
    """y [M, O] in `dtype` by three kernels, or two without rotations.

    empty: values and steps of Tokens, to be written. product(tokens, bias_O, dtype): W x' + B A x' + bias. late: with
    PDL, the product starts when the kernel before it ends; earlier, its programs land where that one has left room.
    """
    tokens = rotate_few_inputs(x_MI, packed, empty, pdl, late)
    if packed.input_signs_I is None:
        return product(tokens, packed.bias_O, dtype)
    return rotate_few_outputs(product(tokens, None, torch.float32).unsqueeze(0), packed, dtype, pdl)


def rotate_few_outputs(y_SMO: Tensor, packed: PackedLinear, dtype: torch.dtype, pdl: bool) -> Tensor:
    """signs ⊙ Hᵀ y + bias in `dtype` [M, O], of the sum of y_SMO, float32."""
    splits, m, n = y_SMO.shape
    y_out = y_SMO.new_empty(m, n, dtype=dtype)
    lengths = [segment.rows for segment in packed.spec.segments] or [n]
    inverse = inverse_factors(packed.spec, y_SMO.device)
    blocks = max(lengths) // inverse.block
    hadamard_output_kernel[inverse.count, m](
        y_SMO, packed.output_signs_O, inverse.outer, inverse.places, packed.bias_O, y_out, m, n, splits=splits,
        A=blocks, BLOCK_A=triton.next_power_of_2(blocks), B=inverse.block,
        factor=inverse.factor * headroom(packed.dtype), pdl=pdl, num_warps=HADAMARD_WARPS, **launch_options(pdl),
    )  # fmt: skip
    return y_out


def rotate_few_inputs(
    x_MI: Tensor, packed: PackedLinear, empty: tuple[Tensor, Tensor], pdl: bool, late: bool
) -> Tokens:
    """x' = H (signs ⊙ x), or x if the layer has no rotation, and partial sums of x' A; empty: values and steps."""
    signs_I = packed.input_signs_I
    (m, k), rank, tiles = x_MI.shape, packed.spec.rank, packed.spec.layout.padded_columns // TILE_K
    factors = None if signs_I is None else hadamard_factors(k, False, x_MI.device)
    blocks, block = (tiles, TILE_K) if factors is None else (k // factors.block, factors.block)
    tokens = Tokens(*empty, x_MI.new_empty((tiles, m, rank), dtype=torch.float32) if rank else None)
    hadamard_input_kernel[tiles, m](
        x_MI, signs_I, None if factors is None else factors.outer, packed.a_codes, tokens.values, tokens.steps,
        tokens.projection, m, k, x_MI.stride(0), rank=rank, tiles=tiles, A=blocks,
        BLOCK_A=triton.next_power_of_2(blocks), B=block, BLOCK_R=min(packed.spec.own_rank, RANKS_AT_ONCE),
        factor=1.0 if factors is None else factors.factor / headroom(x_MI.dtype), late=late, pdl=pdl,
        num_warps=HADAMARD_WARPS, **launch_options(pdl),
    )  # fmt: skip
    return tokens


def ranks_of_a_split(rank: int, splits: int) -> int:
    """A power of two that divides a padded rank, so that all splits have about as many ranks."""
    return min(PRODUCT_RANKS_AT_ONCE, max(8, 1 << (rank // splits).bit_length() >> 1))
