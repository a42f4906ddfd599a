"""Host side of what surrounds a product with lattice or trellis codes: Hadamard rotations, x A, and the parts of B.

Shapes: M tokens, I in_features, O out_features, R rank, S partial sums, A blocks of a Hadamard matrix; P marks padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from lqer.kernels.fusion import UNFUSED, Fused
from lqer.kernels.layout.lattice import LatticeLayout
from lqer.kernels.layout.tiles import TILE_K, TiledLayout
from lqer.kernels.packed import PackedLinear
from lqer.kernels.rotations.kernels import rotate_input_kernel, rotate_output_kernel
from lqer.kernels.runtime import INTERPRETED, launch_options, multiprocessors
from lqer.kernels.spec import Spec
from lqer.transforms.hadamard import FLOAT16_HEADROOM, run_rotated
from lqer.transforms.hadamard_factors import small_order, two_factors

LARGEST_BLOCK = 256
LARGEST_OUTER = 256  # rows of the outer factor: a program reads all blocks
# Of a program: powers of two. With a branch each program reads its columns of A, which takes longer than the token.
MOST_VALUES, FEWEST_VALUES_OF_BRANCH = 1024, 256
# Blocks of a token for one warp, whose signs and rows of O its registers hold.
MOST_TURNS = 16
WARPS = 8  # of programs whose blocks are smaller than a tile, and at least of those that multiply x' with A
PRODUCTS_AT_ONCE, FEWEST_RANKS = 1 << 14, 16  # of values with A, in the rotation of inputs, for ranks at once
# In the product: Triton's shared memory for B must fit into 48 KB together with the table of lattice codes.
PRODUCT_RANKS_AT_ONCE = 32

# What reads the tokens: layout/lattice.py, trellis/byte_sums.py, layout/trellis.py, halves.py.
Kind = Literal["integers", "bytes", "tiles", "halves"]


@dataclass(frozen=True)
class Tokens:
    """x' as a product reads it.

    values: int8 [M, 2, IP] ("integers" and "bytes") or float16 [M, IP]. steps: int32 [M, tiles, 2] ("integers"),
    float32 [M, tiles] ("bytes" and "tiles") or [M]. projection: partial sums of x' A, float32 [splits, M, RP], or None.
    """

    values: Tensor
    steps: Tensor
    projection: Tensor | None

    @property
    def projection_splits(self) -> int:
        return 0 if self.projection is None else len(self.projection)


@dataclass(frozen=True)
class Rotations:
    """Hᵀ of a layer's outputs, or of each of several segments, with blocks of one size.

    rows: of the programs of a token, float32 [padded A of its rotation, together] each, one after the other. places:
    int32 [programs, 5]: first column of the rotation, its blocks A, those of all programs before (padded), column of
    the first block of the program, and the blocks from there on.
    """

    rows: Tensor
    places: Tensor
    block: int
    together: int  # blocks of a program
    longest: int  # blocks of the longest rotation


@lru_cache
def rows_of_programs(
    length: int, inverse: bool, block: int, together: int, padded: int, device: torch.device
) -> Tensor:
    """Rows of O / sqrt(block), or Oᵀ, as a program reads them: float32 [programs, padded A, together], zero beyond.

    Cached on the device, because a CUDA graph must not copy from the host.
    """
    outer_AA, inner = two_factors(length, block)
    assert len(inner) == block
    outer_AA = (outer_AA.T if inverse else outer_AA) * block**-0.5
    whole = pad(outer_AA, (0, padded - len(outer_AA), 0, -len(outer_AA) % together))
    return whole.view(-1, together, padded).transpose(1, 2).to(torch.float32).contiguous().to(device)


def block_of(lengths: list[int]) -> int:
    """The size of a block that fits all of these."""
    return min(LARGEST_BLOCK, *(length // small_order(length) for length in lengths))


def values_of_program(length: int, tokens: int, rank: int, device: torch.device) -> int:
    """As many as can be, for a program reads its token as a whole; with a branch as many as leave enough programs.

    But no fewer than that lanes compute the blocks, where they can.
    """
    values, wanted = MOST_VALUES, length * tokens // multiprocessors(device)
    fewest = max(FEWEST_VALUES_OF_BRANCH, TILE_K * -(-length // (LARGEST_BLOCK * MOST_TURNS)))
    while rank and values > wanted and values // 2 >= fewest:
        values //= 2
    return values


@dataclass(frozen=True)
class Program:
    """How a program computes blocks of rotations: see kernels.py."""

    block: int
    together: int  # blocks of a program
    padded: int  # blocks of the longest rotation, padded
    lanes: bool  # whether its lanes have columns of their own

    @property
    def warps(self) -> int:
        return self.together * self.block // TILE_K if self.lanes else WARPS


def program_of(lengths: list[int], values: int) -> Program:
    block = block_of(lengths)
    longest = max(lengths) // block
    together = max(1, TILE_K // block, values // block)
    warps = together * block // TILE_K
    padded = -(-longest // warps) * warps
    if INTERPRETED or block < TILE_K or padded // warps > MOST_TURNS:
        return Program(block, together, longest, False)
    return Program(block, together, padded, True)


@lru_cache
def output_rotations(spec: Spec, values: int, device: torch.device) -> tuple[Rotations, Program]:
    """The rotation of a layer's outputs; cached as those of `rows_of_programs`. values: of a program."""
    segments = [(segment.start, segment.rows) for segment in spec.segments] or [(0, spec.layout.rows)]
    program = program_of([length for _, length in segments], values)
    block, together = program.block, program.together
    rows, places, before = [], [], 0
    for start, length in segments:
        blocks = length // block
        rows.append(rows_of_programs(length, True, block, together, program.padded, device).flatten())
        for i in range(0, blocks, together):
            places.append((start, blocks, before, start + i * block, blocks - i))
            before += program.padded
    longest = max(length for _, length in segments) // block
    table = torch.tensor(places, dtype=torch.int32, device=device)
    return Rotations(torch.cat(rows), table, block, together, longest), program


@lru_cache
def input_rotation(layout: TiledLayout, values: int, device: torch.device) -> tuple[Tensor, Program]:
    """Of the rotation of inputs: `rows_of_programs` for all tiles, and the programs."""
    program = program_of([layout.columns], min(values, triton.next_power_of_2(layout.columns)))
    rows = rows_of_programs(layout.columns, False, program.block, program.together, program.padded, device)
    programs = -(-layout.padded_columns // (program.block * program.together))
    return pad(rows, (0, 0, 0, 0, 0, programs - len(rows))).contiguous(), program


def prepare_rotations(spec: Spec, device: torch.device) -> None:
    """Compute what a call reads before it is made."""
    assert isinstance(spec.layout, TiledLayout)
    values = MOST_VALUES
    while values >= FEWEST_VALUES_OF_BRANCH:
        input_rotation(spec.layout.compiled, values, device)
        output_rotations(spec, values, device)
        values //= 2


@lru_cache
def fits_hadamard(length: int) -> bool:
    """Whether the kernels rotate vectors of this length; torch rotates the others."""
    return length // block_of([length]) <= LARGEST_OUTER


def kernels_rotate(spec: Spec) -> bool:
    """Whether the kernels can rotate the inputs and outputs of such a layer."""
    lengths = [segment.rows for segment in spec.segments] or [spec.layout.rows]
    return fits_hadamard(spec.layout.columns) and max(lengths) // block_of(lengths) <= LARGEST_OUTER


def run_between_rotations(x_MI: Tensor, packed: PackedLinear, run: Callable[[Tensor, PackedLinear], Tensor]) -> Tensor:
    """y = `run` between the layer's rotations, if it has any, by torch."""
    rotation = packed.rotation
    if rotation is None:
        return run(x_MI, packed)
    inner = replace(packed, bias_O=None, input_signs_I=None, output_signs_O=None)
    return run_rotated(x_MI, rotation, packed.bias_O, lambda x: run(x, inner))


def ranks_at_once(rank: int, program: Program, alone: bool) -> int:
    """Ranks whose columns of A a program of the rotation of inputs has in registers: a power of two.

    alone: on its multiprocessor, of which it may take twice as many then.
    """
    held = max(FEWEST_RANKS, PRODUCTS_AT_ONCE * (1 + alone) // (program.block * program.together))
    return min(held, triton.next_power_of_2(max(rank, FEWEST_RANKS)))


def headroom(dtype: torch.dtype) -> float:
    """x is divided by this before its rotation, and y multiplied by it after its own."""
    return FLOAT16_HEADROOM if dtype == torch.float16 else 1.0


def empty_tokens(x_MI: Tensor, kind: Kind, columns: int, padded: int) -> tuple[Tensor, Tensor]:
    """Values of `padded` tokens ("halves", else of as many as there are), and steps, to be written."""
    m, tiles = len(x_MI), columns // TILE_K
    if kind == "integers":
        return x_MI.new_empty((m, 2, columns), dtype=torch.int8), x_MI.new_empty((m, tiles, 2), dtype=torch.int32)
    if kind == "bytes":
        return x_MI.new_empty((m, 2, columns), dtype=torch.int8), x_MI.new_empty((m, tiles), dtype=torch.float32)
    if kind == "tiles":
        return x_MI.new_empty((m, columns), dtype=torch.float16), x_MI.new_empty((m, tiles), dtype=torch.float32)
    return x_MI.new_empty((padded, columns), dtype=torch.float16), x_MI.new_empty(m, dtype=torch.float32)


def rotate_inputs(
    x_MI: Tensor, packed: PackedLinear, kind: Kind, pdl: bool, padded: int = 0, fused: Fused = UNFUSED
) -> Tokens:
    """x' = H (signs ⊙ x), or x if the layer has no rotation, and partial sums of x' A. padded: see `empty_tokens`.

    fused: what makes x of the given tensor, of a layer that has a rotation.
    """
    (m, k), rank, layout = x_MI.shape, packed.spec.rank, packed.spec.layout
    assert isinstance(layout, TiledLayout)
    values = values_of_program(k, m, rank, x_MI.device)
    room, signs_I = headroom(x_MI.dtype), packed.input_signs_I
    if signs_I is None:
        assert fused.norm is None
        assert fused.up_MI is None
        rows, program = None, Program(TILE_K, min(values // TILE_K, triton.next_power_of_2(layout.tiles)), 0, False)
    else:
        rows, program = input_rotation(layout.compiled, values, x_MI.device)
    norm, up_MI = fused.norm, fused.up_MI
    weight_I, offset, eps = (norm.weight_I, norm.offset, norm.eps) if norm else (None, 0.0, 0.0)
    # Lanes load four values at once.
    read = [x_MI] if up_MI is None else [x_MI, up_MI]
    lanes = program.lanes and all(part.stride(0) % 4 == 0 and part.storage_offset() % 4 == 0 for part in read)
    # Rotations end where the columns do; tiles beyond are zero.
    programs = -(-layout.padded_columns // (program.block * program.together))
    empty = empty_tokens(x_MI, kind, layout.padded_columns, padded)
    partial = x_MI.new_empty((programs, m, rank), dtype=torch.float32) if rank else None
    rotate_input_kernel[programs, m](
        x_MI, signs_I, weight_I, up_MI, rows, packed.a_codes, *empty, partial, m, k, x_MI.stride(0), read[-1].stride(0),
        rank=rank, tiles=layout.tiles, kind=kind, lattice=isinstance(layout, LatticeLayout), lanes=lanes,
        A=k // program.block, padded_A=program.padded, B=program.block, P=program.together,
        BLOCK_I=triton.next_power_of_2(k),
        BLOCK_R=ranks_at_once(rank, program, programs * m <= multiprocessors(x_MI.device)), offset=offset, eps=eps,
        factor=1.0 if rows is None else 1 / room, reach=1.0 if rows is None else k**0.5, pdl=pdl,
        num_warps=max(program.warps, WARPS if rank else 1), **launch_options(pdl),
    )  # fmt: skip
    return Tokens(*empty, partial)


def rotate_outputs(
    y_SMO: Tensor, packed: PackedLinear, dtype: torch.dtype, pdl: bool, residual_MO: Tensor | None = None
) -> Tensor:
    """signs ⊙ Hᵀ y + bias + residual in `dtype` [M, O], of the sum of y_SMO, float32. residual_MO: contiguous."""
    splits, m, n = y_SMO.shape
    y_out = y_SMO.new_empty(m, n, dtype=dtype)
    values = values_of_program(n, m, 0, y_SMO.device)
    inverse, program = output_rotations(packed.spec, values, y_SMO.device)
    rotate_output_kernel[len(inverse.places), m](
        y_SMO, packed.output_signs_O, inverse.rows, inverse.places, packed.bias_O, residual_MO, y_out, m, n,
        splits=splits, lanes=program.lanes, A=inverse.longest, padded_A=program.padded, B=inverse.block,
        P=inverse.together, factor=headroom(packed.dtype), pdl=pdl, num_warps=program.warps, **launch_options(pdl),
    )  # fmt: skip
    return y_out


Product = Callable[[Tokens, Tensor | None, torch.dtype], Tensor]


def run_rotated_product(
    x_MI: Tensor,
    packed: PackedLinear,
    kind: Kind,
    product: Product,
    dtype: torch.dtype,
    pdl: bool,
    fused: Fused = UNFUSED,
) -> Tensor:
    """y [M, O] in `dtype` by three kernels, or two without rotations.

    product(tokens, bias_O, dtype): W x' + B A x' + bias.
    """
    tokens = rotate_inputs(x_MI, packed, kind, pdl, fused=fused)
    if packed.input_signs_I is None:
        return product(tokens, packed.bias_O, dtype)
    y_SMO = product(tokens, None, torch.float32).unsqueeze(0)
    return rotate_outputs(y_SMO, packed, dtype, pdl, fused.residual_MO)


def ranks_of_a_split(rank: int, splits: int) -> int:
    """A power of two that divides a padded rank, so that all splits have about as many ranks."""
    return min(PRODUCT_RANKS_AT_ONCE, max(8, 1 << (rank // splits).bit_length() >> 1))
