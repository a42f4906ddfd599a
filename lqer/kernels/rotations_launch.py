"""Host side of the rotations of many tokens (rotations.py).

Shapes: M tokens, I in_features, O out_features, R rank, A blocks of a Hadamard matrix; P marks padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lqer.kernels.hadamard_launch import Tokens, headroom
from lqer.kernels.lattice import LatticeLayout
from lqer.kernels.packed import PackedLinear
from lqer.kernels.rotations import rotate_input_kernel, rotate_output_kernel
from lqer.kernels.runtime import launch_options, multiprocessors
from lqer.kernels.spec import Spec
from lqer.kernels.tiles import TILE_K, TiledLayout
from lqer.transforms.hadamard_factors import small_order, two_factors

LARGEST_BLOCK = 256
VALUES = (1024, 512, 256)  # of a program
WARPS = 8
RANKS_AT_ONCE = 16


@dataclass(frozen=True)
class Rotations:
    """Hᵀ of a layer's outputs, or of each of several segments, with blocks of one size.

    rows: of the programs of a token, float32 [A of its rotation, together] each, one after the other. places: int32
    [programs, 5]: first column of the rotation, its blocks A, those of all programs before, column of the first block
    of the program, and the blocks from there on.
    """

    rows: Tensor
    places: Tensor
    block: int
    together: int  # blocks of a program
    longest: int  # blocks of the longest rotation


@lru_cache
def rows_of_programs(length: int, inverse: bool, block: int, together: int, device: torch.device) -> Tensor:
    """Rows of O / sqrt(block), or Oᵀ, as a program reads them: float32 [programs, A, together], zero beyond the last.

    Cached on the device, because a CUDA graph must not copy from the host.
    """
    outer_AA, inner = two_factors(length, block)
    assert len(inner) == block
    outer_AA = (outer_AA.T if inverse else outer_AA) * block**-0.5
    padded = torch.nn.functional.pad(outer_AA, (0, 0, 0, -len(outer_AA) % together))
    return padded.view(-1, together, len(outer_AA)).transpose(1, 2).to(torch.float32).contiguous().to(device)


def block_of(lengths: list[int]) -> int:
    """The size of a block that fits all of these."""
    return min(LARGEST_BLOCK, *(length // small_order(length) for length in lengths))


def values_of_program(length: int, tokens: int, device: torch.device) -> int:
    """As many as leave a program for each multiprocessor, for a program reads its token as a whole."""
    wanted = length * tokens // multiprocessors(device)
    return next((values for values in VALUES if values <= wanted), VALUES[-1])


@lru_cache
def output_rotations(spec: Spec, values: int, device: torch.device) -> Rotations:
    """The rotation of a layer's outputs; cached as those of `rows_of_programs`. values: of a program."""
    segments = [(segment.start, segment.rows) for segment in spec.segments] or [(0, spec.layout.rows)]
    block = block_of([length for _, length in segments])
    together = max(1, values // block)
    rows, places, before = [], [], 0
    for start, length in segments:
        blocks = length // block
        rows.append(rows_of_programs(length, True, block, together, device).flatten())
        for i in range(0, blocks, together):
            places.append((start, blocks, before, start + i * block, blocks - i))
            before += blocks
    longest = max(length for _, length in segments) // block
    table = torch.tensor(places, dtype=torch.int32, device=device)
    return Rotations(torch.cat(rows), table, block, together, longest)


def prepare_rotations(spec: Spec, device: torch.device) -> None:
    """Compute what a call reads before it is made."""
    assert isinstance(spec.layout, TiledLayout)
    for values in VALUES:
        input_rotation(spec.layout.compiled, values, device)
        output_rotations(spec, values, device)


@lru_cache
def input_rotation(layout: TiledLayout, values: int, device: torch.device) -> tuple[Tensor, int, int]:
    """Of the rotation of inputs: `rows_of_programs` for all tiles, the size of a block, and blocks of a program."""
    block = block_of([layout.columns])
    # A program has whole tiles.
    together = max(1, TILE_K // block, min(values, triton.next_power_of_2(layout.columns)) // block)
    rows = rows_of_programs(layout.columns, False, block, together, device)
    programs = -(-layout.padded_columns // (block * together))
    return torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, programs - len(rows))).contiguous(), block, together


def rotate_inputs(x_MI: Tensor, packed: PackedLinear, empty: tuple[Tensor, Tensor], pdl: bool, late: bool) -> Tokens:
    """x' = H (signs ⊙ x), or x if the layer has no rotation, and partial sums of x' A.

    empty: values and steps of halves.py, to be written. late: see run_rotated_product.
    """
    (m, k), rank, tiles = x_MI.shape, packed.spec.rank, packed.spec.layout.padded_columns // TILE_K
    values = values_of_program(k, m, x_MI.device)
    room, signs_I = headroom(x_MI.dtype), packed.input_signs_I
    if signs_I is None:
        rows, block, together = None, TILE_K, min(values // TILE_K, triton.next_power_of_2(tiles))
    else:
        rows, block, together = input_rotation(packed.spec.layout.compiled, values, x_MI.device)
    # Rotations end where the columns do; tiles beyond are zero.
    programs = -(-tiles * TILE_K // (block * together))
    partial = x_MI.new_empty((programs, m, rank), dtype=torch.float32) if rank else None
    rotate_input_kernel[programs, m](
        x_MI, signs_I, rows, packed.a_codes, *empty, partial, m, k, x_MI.stride(0), rank=rank, tiles=tiles,
        lattice=isinstance(packed.spec.layout, LatticeLayout), A=k // block, B=block, P=together,
        BLOCK_I=triton.next_power_of_2(k), BLOCK_R=RANKS_AT_ONCE, factor=1.0 if rows is None else 1 / room,
        reach=1.0 if rows is None else k**0.5 / room, late=late, pdl=pdl, num_warps=WARPS, **launch_options(pdl),
    )  # fmt: skip
    return Tokens(*empty, partial)


def rotate_outputs(y_SMO: Tensor, packed: PackedLinear, dtype: torch.dtype, pdl: bool) -> Tensor:
    """signs ⊙ Hᵀ y + bias in `dtype` [M, O], of the sum of y_SMO, float32."""
    splits, m, n = y_SMO.shape
    y_out = y_SMO.new_empty(m, n, dtype=dtype)
    inverse = output_rotations(packed.spec, values_of_program(n, m, y_SMO.device), y_SMO.device)
    rotate_output_kernel[len(inverse.places), m](
        y_SMO, packed.output_signs_O, inverse.rows, inverse.places, packed.bias_O, y_out, m, n, splits=splits,
        A=inverse.longest, B=inverse.block, P=inverse.together, factor=headroom(packed.dtype), pdl=pdl, num_warps=WARPS,
        **launch_options(pdl),
    )  # fmt: skip
    return y_out
