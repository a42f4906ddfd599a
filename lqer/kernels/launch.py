"""Host side of the kernels: grids, work buffers, and which kernels a call runs.

Shapes: M tokens, N out_features, K in_features, R rank; P marks padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lqer.kernels.codebook import CodebookLayout, PackedCodebook, tile_of
from lqer.kernels.expand import branch_kernel, expand_kernel
from lqer.kernels.gemm import gemm_kernel
from lqer.kernels.gemv import gemv_kernel, prepare_vector_kernel
from lqer.kernels.lattice import LatticeLayout, PackedLattice
from lqer.kernels.lattice_launch import LATTICE_TOKENS, expand_lattice, run_in_basis, run_lattice, runs_in_kernels
from lqer.kernels.layout import ROW_PADDING as ROW_TILE
from lqer.kernels.layout import Layout, PackedWeight
from lqer.kernels.lookup import codebook_expand_kernel, codebook_product_kernel
from lqer.kernels.packed import PROJECTION_COUNTERS, TOKEN_TILES, AnyWeight, PackedLinear
from lqer.kernels.runtime import INTERPRETED, can_chain, launch_options
from lqer.kernels.tokens import prepare_tokens_kernel, project_kernel, round_kernel
from lqer.kernels.tuning import GemmLaunch, GemvLaunch, bucket_of, gemm_launch, gemv_launch

ROUNDED_ROWS, ROUNDED_COLUMNS, ROUNDING_WARPS = 16, 256, 4
PROJECTION_COLUMNS = 256  # of x, for one program
PROJECTED_ROWS, PROJECTED_COLUMNS, PROJECTED_WARPS, PROJECTED_STAGES = 16, 256, 4, 1
PROJECTING_PROGRAMS = 2 * PROJECTION_COUNTERS  # a split of K takes a counter; about four on a multiprocessor
BRANCH_ROWS, BRANCH_COLUMNS, BRANCH_WARPS = 128, 64, 8
CODEBOOK_TOKENS = 16  # more of them are faster with weights decoded to memory
LOOKUP_TOKENS = 8  # of a program
LOOKUP_REGISTERS = {1: 64, 8: 128}  # by tokens of a program: eight programs fit a multiprocessor, and four
FIELDS_AT_ONCE = 4  # of a word, times the tokens of a program
PREPARED_COLUMNS = 1024
VECTOR_TILES = 4  # of x's codes, for one program
VECTOR_COLUMNS = 16384  # of x and A, at once
VECTOR_WARPS = 8
SMALLEST_BLOCK_M = 16
MAX_BLOCK_R = 64
GEMV_MAX_RANK = 64  # a program holds its part of A, and all of B's rows, in registers


def run_layer(x_MK: Tensor, packed: PackedLinear) -> Tensor:
    """y [M, N] of x [M, K], both in packed.dtype, by the kernels that the table names."""
    layout = packed.spec.layout
    if isinstance(layout, LatticeLayout):
        return run_lattice_layer(x_MK, packed)
    if isinstance(layout, CodebookLayout):
        return run_codebook(x_MK, packed) if len(x_MK) <= CODEBOOK_TOKENS else run_expanded(x_MK, packed)
    if len(x_MK) == 1 and fits_gemv(packed):
        return run_gemv(x_MK, packed, gemv_launch(layout.rows, layout.columns))
    bucket = bucket_of(len(x_MK))
    launch = bucket and gemm_launch(layout.width, layout.rows, layout.columns, bucket)
    if launch and fits_gemm(packed, len(x_MK), launch):
        return run_gemm(x_MK, packed, launch)
    return run_expanded(x_MK, packed)


def run_lattice_layer(x_MK: Tensor, packed: PackedLinear) -> Tensor:
    """Few tokens by the kernels of lattice codes; many, and rounded ones, decoded to memory."""

    def run(x: Tensor, packed: PackedLinear) -> Tensor:
        return run_lattice(_dense_rows(x), packed, can_chain(x))

    if len(x_MK) > LATTICE_TOKENS or packed.spec.rounding.bits:
        return run_in_basis(x_MK, packed, run_expanded)
    return run(x_MK, packed) if runs_in_kernels(packed) else run_in_basis(x_MK, packed, run)


def fits_gemv(packed: PackedLinear) -> bool:
    """Whether the integer kernel can run this layer for one token."""
    spec, layout = packed.spec, packed.spec.layout
    assert isinstance(layout, Layout)
    weight_fits = layout.exponents and layout.bits == 4 and layout.block in (16, 32)
    return weight_fits and spec.rounding.bits > 0 and spec.rank <= GEMV_MAX_RANK


def fits_gemm(packed: PackedLinear, tokens: int, launch: GemmLaunch) -> bool:
    """Whether the layer has counters enough for so many tokens."""
    token_tiles = -(-tokens // launch.block_m)
    return token_tiles <= TOKEN_TILES and branch_counters(packed.spec.rank) * token_tiles <= PROJECTION_COUNTERS


def branch_counters(rank: int) -> int:
    """Counters that the branch takes for a tile of tokens: see branch.py."""
    return 1 + rank // _block_r(rank) if rank else 0


def run_gemv(x_1K: Tensor, packed: PackedLinear, launch: GemvLaunch, out_dtype: torch.dtype | None = None) -> Tensor:
    """One token, in integers; y in `out_dtype`, by default that of x."""
    spec, weight = packed.spec, packed.weight
    assert isinstance(weight, PackedWeight)
    layout = weight.layout
    x_1K = _dense_rows(x_1K)
    padded = layout.padded_columns
    # One buffer, because from Python an allocation takes as long as a small kernel.
    vector = x_1K.new_empty(padded // 2 + spec.rank, dtype=torch.int32)
    chained = can_chain(x_1K)
    block_k = min(VECTOR_COLUMNS, triton.next_power_of_2(layout.columns))
    prepare_vector_kernel[(spec.rank + -(-layout.tiles // VECTOR_TILES),)](
        x_1K, packed.a_codes, packed.a_exponents, vector, layout.columns, rank=spec.rank, tiles=layout.tiles,
        rounding=spec.rounding, a_block=spec.a_block, TILES=VECTOR_TILES, BLOCK_K=block_k, chained=chained,
        num_warps=max(VECTOR_WARPS, block_k // 1024), **launch_options(chained),
    )  # fmt: skip
    y_1N = x_1K.new_empty(1, layout.rows, dtype=out_dtype)
    gemv_kernel[(-(-layout.rows // launch.block_n),)](
        weight.words, weight.scales, packed.bias_N, vector, packed.b_codes, packed.b_exponents, y_1N,
        layout.rows, rank=spec.rank, tiles=layout.tiles, per_tile=layout.scales_per_tile,
        rounding=spec.rounding, b_block=spec.b_block, BLOCK_N=launch.block_n, BLOCK_T=launch.block_t,
        chained=chained, num_warps=launch.warps, **launch_options(chained),
    )  # fmt: skip
    return y_1N


def run_gemm(x_MK: Tensor, packed: PackedLinear, launch: GemmLaunch, out_dtype: torch.dtype | None = None) -> Tensor:
    """Few tokens, weights decoded in registers; y in `out_dtype`, by default that of x."""
    spec, weight = packed.spec, packed.weight
    assert isinstance(weight, PackedWeight)
    layout = weight.layout
    given = _dense_rows(x_MK)
    m, n = len(given), layout.rows
    # The kernel order saves a pass through registers for every row of x, and serializes the tensor cores a little.
    ordered = launch.block_m > SMALLEST_BLOCK_M and spec.rounding.bits > 0
    x_MK = round_tokens(given, packed, ordered)
    y_MN = given.new_empty(m, n, dtype=out_dtype)
    block_n = launch.block_n if layout.padded_rows % launch.block_n == 0 else ROW_TILE
    tiles_n, tiles_m = layout.padded_rows // block_n, -(-m // launch.block_m)
    splits = min(launch.splits, layout.tiles)
    parts = splits + (1 if spec.rank else 0)
    partial = given.new_empty((parts, n, m), dtype=torch.float32) if parts > 1 else None
    branch = _branch(given, packed)
    producers = branch.slabs * branch.rank_blocks * tiles_m
    gemm_kernel[(producers + tiles_n * parts * tiles_m,)](
        x_MK, given, *weight.parts, packed.bias_N, packed.a_codes, packed.a_exponents,
        packed.b_codes, packed.b_exponents, partial, packed.workspace[PROJECTION_COUNTERS:], branch.partial,
        branch.projection, packed.workspace, y_MN, m, n, layout.columns, x_MK.stride(0), given.stride(0),
        rank=spec.rank, layout=layout.compiled, ordered=ordered, rounding=spec.rounding,
        **branch.constants, padded_K=layout.padded_columns, tiles_n=tiles_n, BLOCK_N=block_n,
        BLOCK_M=launch.block_m, BLOCK_R=_block_r(spec.rank), splits=splits, stages=launch.stages,
        num_warps=launch.warps, **_register_limit(launch),
    )  # fmt: skip
    return y_MN


def _register_limit(launch: GemmLaunch) -> dict[str, int]:
    """Four programs of four warps on a multiprocessor, where their accumulators leave room for that."""
    small = (launch.block_n, launch.block_m, launch.warps) == (128, SMALLEST_BLOCK_M, 4)
    return {"maxnreg": 128} if small and not INTERPRETED else {}


@dataclass(frozen=True)
class _Branch:
    """Work buffers and compile-time arguments of the low-rank branch; empty at rank 0."""

    slabs: int
    rank_blocks: int
    partial: Tensor | None
    projection: Tensor | None
    constants: dict[str, int]


def _branch(x_MK: Tensor, packed: PackedLinear) -> _Branch:
    spec, m = packed.spec, len(x_MK)
    constants = {"a_block": spec.a_block, "b_block": spec.b_block, "slabs": 0, "SLAB_K": PROJECTION_COLUMNS}
    if not spec.rank:
        return _Branch(0, 0, None, None, constants)
    slabs = -(-spec.layout.columns // PROJECTION_COLUMNS)
    partial = x_MK.new_empty((slabs, m, spec.rank), dtype=torch.float32)
    projection = x_MK.new_empty(m, spec.rank)
    return _Branch(slabs, spec.rank // _block_r(spec.rank), partial, projection, constants | {"slabs": slabs})


def run_codebook(x_MK: Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
    """Few tokens, centroids looked up in shared memory; y in `out_dtype`, by default that of x."""
    spec, weight = packed.spec, packed.weight
    assert isinstance(weight, PackedCodebook)
    layout = weight.layout
    x_MK, projection_MR = _pair_rows(_dense_rows(x_MK), layout), None
    if spec.rank:
        x_MK, projection_MR = prepare_tokens(x_MK, packed)
    else:
        x_MK = round_tokens(x_MK, packed, ordered=False)
    m, n = len(x_MK), layout.rows
    y_MN = x_MK.new_empty(m, n, dtype=out_dtype)
    block_m = min(LOOKUP_TOKENS, 1 << (m - 1).bit_length())
    chained = can_chain(x_MK)
    limit = {} if INTERPRETED or block_m not in LOOKUP_REGISTERS else {"maxnreg": LOOKUP_REGISTERS[block_m]}
    tile = tile_of(layout.compiled)
    codebook_product_kernel[-(-n // tile.rows), -(-m // block_m)](
        x_MK, weight.words, weight.table, packed.bias_N, projection_MR, packed.b_codes, packed.b_exponents, y_MN,
        m, n, layout.columns, x_MK.stride(0), rank=spec.rank, rounding=spec.rounding, b_block=spec.b_block,
        layout=layout.compiled, program=tile, FIELDS=min(layout.per_word, max(1, FIELDS_AT_ONCE // block_m)),
        BLOCK_M=block_m, chained=chained, num_warps=tile.warps, **launch_options(chained), **limit,
    )  # fmt: skip
    return y_MN


def prepare_tokens(x_MK: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor]:
    """Few tokens: x rounded (itself where it is not) and x_q A, float32 [M, RP], not rounded."""
    spec, (m, k) = packed.spec, x_MK.shape
    rounded_MK = x_MK.new_empty(m, k) if spec.rounding.bits else x_MK
    projection_MR = x_MK.new_empty(m, spec.rank, dtype=torch.float32)
    rounding_programs = -(-k // PREPARED_COLUMNS) if spec.rounding.bits else 0
    chained = can_chain(x_MK)
    block_k = min(VECTOR_COLUMNS, triton.next_power_of_2(spec.layout.padded_columns))
    prepare_tokens_kernel[spec.rank + rounding_programs, m](
        x_MK, packed.a_codes, packed.a_exponents, rounded_MK, projection_MR, k, x_MK.stride(0), rank=spec.rank,
        padded_K=spec.layout.padded_columns, rounding=spec.rounding, a_block=spec.a_block, BLOCK_K=block_k,
        COLUMNS=PREPARED_COLUMNS, chained=chained, num_warps=max(VECTOR_WARPS, block_k // 1024),
        **launch_options(chained),
    )  # fmt: skip
    return rounded_MK, projection_MR


def run_expanded(x_MK: Tensor, packed: PackedLinear) -> Tensor:
    """Many tokens: weights decoded to memory once, beside that the branch, to which a library adds the product."""
    x_MK = _dense_rows(x_MK)
    if packed.a_codes is None:
        x_MK = round_tokens(x_MK, packed, ordered=False)
        return torch.nn.functional.linear(x_MK, expand(packed.weight, x_MK.dtype), packed.bias_N)
    rounded_MK, projection_MR, y_MN = branch_buffers(x_MK, packed)
    with _beside(x_MK) as join:
        project(x_MK, packed, rounded_MK, projection_MR)
        write_branch(projection_MR, packed, y_MN)
    w_NK = expand(packed.weight, x_MK.dtype)
    join()
    return y_MN.addmm_(rounded_MK, w_NK.T)


@contextmanager
def _beside(x: Tensor) -> Iterator[Callable[[], None]]:
    """Run the body's kernels beside what follows, until the yielded function is called.

    What outlives the body is allocated by the caller, on its own stream; what the body allocates, it frees.
    """
    if not x.is_cuda:
        yield lambda: None
        return
    here, aside = torch.cuda.current_stream(x.device), _side_stream(x.device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        yield lambda: here.wait_stream(aside)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Of high priority: its kernels are short of programs, and those beside them fill what is left of the chip."""
    return torch.cuda.Stream(device, priority=-1)


def branch_buffers(x_MK: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """What `project` and `write_branch` fill: x rounded (itself where it is not), Q(x A) [M, RP] and y [M, N]."""
    m, spec = len(x_MK), packed.spec
    rounded_MK = x_MK.new_empty(x_MK.shape) if spec.rounding.bits else x_MK
    return rounded_MK, x_MK.new_empty(m, spec.rank), x_MK.new_empty(m, spec.layout.rows)


def project(x_MK: Tensor, packed: PackedLinear, rounded_MK: Tensor, projection_MR: Tensor) -> None:
    """Round x to the layer's activation format, if it has one, and multiply it by A: Q(x A)."""
    spec, block_r, (m, k) = packed.spec, _block_r(packed.spec.rank), x_MK.shape
    tiles_m, rank_blocks = -(-m // PROJECTED_ROWS), spec.rank // block_r
    steps, wanted = -(-k // PROJECTED_COLUMNS), PROJECTING_PROGRAMS // (tiles_m * rank_blocks)
    # Few different numbers, because every one is a compilation.
    steps_of_slab = triton.next_power_of_2(-(-steps // max(wanted, 1)))
    slabs = -(-steps // steps_of_slab)
    partial = x_MK.new_empty((slabs, m, spec.rank), dtype=torch.float32) if slabs > 1 else None
    project_kernel[slabs, tiles_m, rank_blocks](
        x_MK, packed.a_codes, packed.a_exponents, rounded_MK, partial, projection_MR, packed.workspace, m, k,
        x_MK.stride(0), rank=spec.rank, padded_K=spec.layout.padded_columns, slabs=slabs,
        SLAB_K=steps_of_slab * PROJECTED_COLUMNS, rounding=spec.rounding, a_block=spec.a_block,
        BLOCK_M=PROJECTED_ROWS, BLOCK_K=PROJECTED_COLUMNS, BLOCK_R=block_r, stages=PROJECTED_STAGES,
        num_warps=PROJECTED_WARPS,
    )  # fmt: skip


def round_tokens(x_MK: Tensor, packed: PackedLinear, ordered: bool) -> Tensor:
    """x rounded to the layer's activation format, in kernel order if asked for; x itself where there is none."""
    if not packed.spec.rounding.bits:
        return x_MK
    spec, layout = packed.spec, packed.spec.layout
    m, k = x_MK.shape
    padded = layout.padded_columns
    tile_k = layout.tile_k if ordered and isinstance(layout, Layout) else 0
    x_out = x_MK.new_empty(m, padded if tile_k else k)
    chained = can_chain(x_MK)
    round_kernel[-(-m // ROUNDED_ROWS), -(-padded // ROUNDED_COLUMNS)](
        x_MK, x_out, m, k, x_MK.stride(0), padded=padded, tile_k=tile_k,
        BLOCK_K=ROUNDED_COLUMNS, BLOCK_M=ROUNDED_ROWS, rounding=spec.rounding, chained=chained,
        num_warps=ROUNDING_WARPS, **launch_options(chained),
    )  # fmt: skip
    return x_out


def expand(weight: AnyWeight, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype` [N, K]."""
    layout = weight.layout
    w_NK = torch.empty(layout.rows, layout.columns, dtype=dtype, device=weight.words.device)
    if isinstance(weight, PackedCodebook):
        tile = tile_of(weight.layout.compiled)
        codebook_expand_kernel[-(-layout.rows // tile.rows), -(-weight.layout.row_words // tile.words)](
            weight.words, weight.table, w_NK, layout.rows, layout.columns, layout=weight.layout.compiled,
            program=tile, FIELDS=min(FIELDS_AT_ONCE, weight.layout.per_word), num_warps=tile.warps,
        )  # fmt: skip
        return w_NK
    if isinstance(weight, PackedLattice):
        expand_lattice(weight, w_NK)
        return w_NK
    expand_kernel[weight.layout.padded_rows // ROW_TILE, weight.layout.tiles](
        *weight.parts, w_NK, layout.rows, layout.columns, layout=weight.layout.compiled,
        BLOCK_N=ROW_TILE, num_warps=4,
    )  # fmt: skip
    return w_NK


def write_branch(projection_MR: Tensor, packed: PackedLinear, y_MN: Tensor) -> None:
    """y = Q(Q(x A) B) + b; projection: Q(x A)."""
    spec, (m, n) = packed.spec, y_MN.shape
    branch_kernel[-(-n // BRANCH_COLUMNS), -(-m // BRANCH_ROWS)](
        y_MN, projection_MR, packed.b_codes, packed.b_exponents, packed.bias_N, m, n, rank=spec.rank,
        b_block=spec.b_block, rounding=spec.rounding, BLOCK_N=BRANCH_COLUMNS, BLOCK_M=BRANCH_ROWS,
        BLOCK_R=_block_r(spec.rank), num_warps=BRANCH_WARPS,
    )  # fmt: skip


def _block_r(rank: int) -> int:
    return min(max(rank, 16), MAX_BLOCK_R)


def _dense_rows(x_MK: Tensor) -> Tensor:
    """Rows may lie apart, elements of a row may not."""
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def _pair_rows(x_MK: Tensor, layout: CodebookLayout) -> Tensor:
    """Where kernels read pairs of neighbours, these lie at addresses that four divides."""
    lie = x_MK.data_ptr() % 4 == 0 and x_MK.stride(0) % 2 == 0
    return x_MK if lie or not layout.filled else x_MK.clone(memory_format=torch.contiguous_format)
