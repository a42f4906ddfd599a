"""Host side of the kernels: grids, work buffers, and which kernels a call runs.

Shapes: M tokens, N out_features, K in_features, R rank; P marks padding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .epilogue import epilogue_kernel
from .expand import expand_factor_kernel, expand_kernel
from .gemm import gemm_kernel
from .gemv import gemv_kernel, prepare_vector_kernel
from .layout import ROW_PADDING as ROW_TILE
from .layout import Layout, PackedWeight
from .linear import INTERPRETED, PackedLinear
from .project import project_kernel
from .tuning import GemmLaunch, GemvLaunch, bucket_of, gemm_launch, gemv_launch

# Programs of the projection: enough to fill the chip, in few enough slabs that adding them up stays cheap.
PROJECTION_PROGRAMS = 128
PROJECTION_ROWS, PROJECTION_COLUMNS, PROJECTION_WARPS = 16, 256, 8
VECTOR_TILES = 4
MAX_BLOCK_R = 64
GEMV_MAX_RANK = 512


def run_layer(x_MK: Tensor, packed: PackedLinear) -> Tensor:
    """y [M, N] of x [M, K], both in packed.dtype, by the kernels that the table names."""
    layout = packed.spec.layout
    if len(x_MK) == 1 and fits_gemv(packed):
        return run_gemv(x_MK, packed, gemv_launch(layout.rows, layout.columns))
    bucket = bucket_of(len(x_MK))
    launch = bucket and gemm_launch(layout.width, layout.rows, layout.columns, bucket)
    return run_gemm(x_MK, packed, launch) if launch else run_expanded(x_MK, packed)


def fits_gemv(packed: PackedLinear) -> bool:
    """Whether the integer kernel can run this layer for one token."""
    spec, layout = packed.spec, packed.spec.layout
    powers_of_two = spec.rank & (spec.rank - 1) == 0
    return layout.exponents and layout.bits == 4 and layout.block in (16, 32) and spec.rounding.bits > 0 and powers_of_two


def run_gemv(x_1K: Tensor, packed: PackedLinear, launch: GemvLaunch) -> Tensor:
    """One token, in integers."""
    spec, layout = packed.spec, packed.spec.layout
    x_1K = _dense_rows(x_1K)
    padded = layout.tiles * layout.tile_k
    codes = x_1K.new_empty(padded // 4, dtype=torch.int32)
    steps = x_1K.new_empty(padded // 8, dtype=torch.float32)
    sums = x_1K.new_empty(padded // 8, dtype=torch.int32)
    slabs = -(-layout.tiles // VECTOR_TILES)
    projection = x_1K.new_empty((slabs, 1, spec.rank), dtype=torch.float32) if spec.rank else None
    chained = can_chain(x_1K, "gemv")
    prepare_vector_kernel[(slabs,)](
        x_1K, packed.a_codes, packed.a_exponents, codes.view(torch.int8), steps, sums, projection, layout.columns,
        rank=spec.rank, tiles=layout.tiles, **_rounding_constants(packed), a_block=spec.a_block, TILES=VECTOR_TILES,
        chained=chained, num_warps=4, **_launch_options(chained),
    )  # fmt: skip
    y_1N = x_1K.new_empty(1, layout.rows)
    gemv_kernel[(-(-layout.rows // launch.block_n),)](
        packed.weight.words, packed.weight.scales, packed.bias_N, codes, steps, sums, projection, packed.b_codes,
        packed.b_exponents, y_1N, layout.rows, rank=spec.rank, chunks=slabs, tiles=layout.tiles,
        per_tile=layout.scales_per_tile, **_rounding_constants(packed), b_block=spec.b_block, BLOCK_N=launch.block_n,
        BLOCK_T=launch.block_t, chained=chained, num_warps=launch.warps, **_launch_options(chained),
    )  # fmt: skip
    return y_1N


def run_gemm(x_MK: Tensor, packed: PackedLinear, launch: GemmLaunch) -> Tensor:
    """Few tokens, weights decoded in registers."""
    layout = packed.spec.layout
    given = x_MK = _dense_rows(x_MK)
    m, n = len(x_MK), layout.rows
    x_MK, projection = project(given, packed)
    y_MN = x_MK.new_empty(m, n)
    block_n = launch.block_n if layout.padded_rows % launch.block_n == 0 else ROW_TILE
    tiles_n, tiles_m = layout.padded_rows // block_n, -(-m // launch.block_m)
    # Tiles of outputs that outnumber the counters fill the chip without splitting K.
    splits = min(launch.splits, layout.tiles) if tiles_n * tiles_m <= len(packed.workspace) else 1
    slabs_left = projection is not None
    partial = x_MK.new_empty((splits, n, m), dtype=torch.float32) if splits > 1 or slabs_left else None
    rounded = x_MK is not given
    chained = can_chain(given, "gemm") and (rounded or slabs_left)
    gemm_kernel[tiles_n, splits, tiles_m](
        x_MK, *_weight_tensors(packed.weight), packed.bias_N, partial, packed.workspace,
        None if slabs_left else y_MN, m, n, layout.columns, x_MK.stride(0), **weight_constants(layout, given.dtype),
        BLOCK_N=block_n, BLOCK_M=launch.block_m, splits=splits, stages=launch.stages, wait_first=chained and rounded,
        wait_last=chained and not rounded, num_warps=launch.warps, **_launch_options(chained),
    )  # fmt: skip
    if projection is not None:
        add_low_rank_(y_MN, partial, projection, packed, packed.bias_N)
    return y_MN


def run_expanded(x_MK: Tensor, packed: PackedLinear) -> Tensor:
    """Many tokens: weights and A decoded to memory once, then a library's products."""
    x_MK = round_rows(_dense_rows(x_MK), packed)
    y_MN = torch.nn.functional.linear(x_MK, expand(packed.weight, x_MK.dtype), packed.bias_N)
    if packed.a_codes is not None:
        a_KR = expand_factor(packed.a_codes, packed.a_exponents, packed.spec.a_block, x_MK.dtype)[: x_MK.shape[1]]
        if x_MK.is_cuda:
            projection_MR = torch.mm(x_MK, a_KR, out_dtype=torch.float32)
        else:
            projection_MR = x_MK.to(torch.float32) @ a_KR.to(torch.float32)
        add_low_rank_(y_MN, None, projection_MR[None], packed, None)
    return y_MN


def round_rows(x_MK: Tensor, packed: PackedLinear) -> Tensor:
    """x rounded to the layer's activation format; x itself where there is none."""
    if not packed.spec.rounding.bits:
        return x_MK
    return _launch_project(x_MK, packed, rank=0, slabs=-(-x_MK.shape[1] // PROJECTION_COLUMNS))[0]


def project(x_MK: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor | None]:
    """x, rounded where activations are, and the slabs of its product with A [S, M, RP], or None."""
    if not packed.spec.rank:
        return round_rows(x_MK, packed), None
    row_blocks = -(-len(x_MK) // PROJECTION_ROWS)
    # Many tokens fill the chip by themselves, and every slab more is work for whoever adds them up.
    slabs = max(1, PROJECTION_PROGRAMS // row_blocks)
    return _launch_project(x_MK, packed, packed.spec.rank, slabs)


def _launch_project(x_MK: Tensor, packed: PackedLinear, rank: int, slabs: int) -> tuple[Tensor, Tensor | None]:
    spec, layout = packed.spec, packed.spec.layout
    m, k = x_MK.shape
    steps = -(-k // PROJECTION_COLUMNS)
    per_slab = -(-steps // slabs)
    slabs = -(-steps // per_slab)
    x_out = x_MK.new_empty(m, k) if spec.rounding.bits else None
    projection = x_MK.new_empty((slabs, m, rank), dtype=torch.float32) if rank else None
    block_r = _block_r(rank)
    chained = can_chain(x_MK, "project")
    project_kernel[-(-m // PROJECTION_ROWS), slabs, max(1, rank // block_r)](
        x_MK, packed.a_codes, packed.a_exponents, x_out, projection, m, k, x_MK.stride(0),
        rank=rank, a_rows=layout.tiles * layout.tile_k, steps=per_slab, BLOCK_K=PROJECTION_COLUMNS,
        BLOCK_M=PROJECTION_ROWS, BLOCK_R=block_r, **_rounding_constants(packed), a_block=spec.a_block,
        chained=chained, num_warps=PROJECTION_WARPS, **_launch_options(chained),
    )  # fmt: skip
    return x_MK if x_out is None else x_out, projection


def expand(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype` [N, K]."""
    layout = weight.layout
    w_NK = torch.empty(layout.rows, layout.columns, dtype=dtype, device=weight.words.device)
    expand_kernel[layout.padded_rows // ROW_TILE, layout.tiles](
        *_weight_tensors(weight), w_NK, layout.rows, layout.columns, **weight_constants(layout, dtype),
        BLOCK_N=ROW_TILE, num_warps=4,
    )  # fmt: skip
    return w_NK


def expand_factor(codes: Tensor, exponents: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
    """A factor in `dtype` [rows, columns]."""
    if exponents is None:
        return codes
    rows, columns = codes.shape
    values = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    block_c = min(64, columns)
    expand_factor_kernel[-(-rows // ROW_TILE), -(-columns // block_c)](
        codes, exponents, values, rows, columns, block=block, BLOCK_R=ROW_TILE, BLOCK_C=block_c, num_warps=4
    )
    return values


def add_low_rank_(
    y_MN: Tensor, partial: Tensor | None, projection: Tensor, packed: PackedLinear, bias_N: Tensor | None
) -> None:
    """y = the sum of the slabs `partial` [splits, N, M], or y as it is, + bias + Q(Q(x A) B), in place."""
    spec = packed.spec
    m, n = y_MN.shape
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    # After the product of a library nothing says when the kernel before has ended but its end.
    chained = partial is not None and can_chain(y_MN, "epilogue")
    epilogue_kernel[-(-n // ROW_TILE), -(-m // block_m)](
        partial, bias_N, projection, packed.b_codes, packed.b_exponents, y_MN, m, n,
        splits=1 if partial is None else len(partial), rank=spec.rank, slabs=len(projection), b_block=spec.b_block,
        **_rounding_constants(packed), BLOCK_N=ROW_TILE, BLOCK_M=block_m, BLOCK_R=_block_r(spec.rank),
        chained=chained, num_warps=4, **_launch_options(chained),
    )  # fmt: skip


def weight_constants(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `decode_tile`."""
    tiles_per_unit = max(1, layout.block // layout.tile_k)
    return {
        "tiles": layout.tiles,
        "units": -(-layout.tiles // tiles_per_unit),
        "tiles_per_unit": tiles_per_unit,
        "per_tile": layout.scales_per_tile,
        "halves": layout.halves,
        "bits": layout.bits,
        "width": layout.width,
        "offset": layout.offset,
        "exponents": layout.exponents,
        "paired": layout.exponents and layout.bits <= 4 and dtype == torch.bfloat16 and not INTERPRETED,
    }


CHAINED = {"gemv", "project", "gemm", "epilogue"}


def can_chain(x: Tensor, kernel: str) -> bool:
    """Whether a kernel may be launched while the one before it still runs (programmatic dependent launch)."""
    return kernel in CHAINED and x.is_cuda and _chains(x.device)


@lru_cache
def _chains(device: torch.device) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch_options(chained: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if chained else {}


def _rounding_constants(packed: PackedLinear) -> dict[str, Any]:
    rounding = packed.spec.rounding
    return {"x_bits": rounding.bits, "x_block": rounding.block, "x_ceil": rounding.ceil}


def _weight_tensors(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    return weight.words, weight.high, weight.scales, weight.zeros


def _block_r(rank: int) -> int:
    return min(max(rank, 16), MAX_BLOCK_R)


def _dense_rows(x_MK: Tensor) -> Tensor:
    """Rows may lie apart, elements of a row may not."""
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
