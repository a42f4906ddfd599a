"""Host side of the kernels on learned codebooks (gemm.py).

Shapes: M tokens, I in_features, O out_features, R rank; P marks padding.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lqer.kernels import runtime
from lqer.kernels.activations import prepare_activations_kernel
from lqer.kernels.codebooks.gemm import codebook_dequantize_kernel, codebook_product_kernel
from lqer.kernels.input_launch import dense_rows, round_activations
from lqer.kernels.layout.codebook import CodebookLayout, PackedCodebook, tile_of
from lqer.kernels.packed import PackedLinear

PROGRAM_TOKENS = 8
REGISTERS = {1: 64, 8: 128}  # by tokens of a program: eight programs share a multiprocessor, or four
FIELDS_AT_ONCE = 4  # of a word, times the tokens of a program
ROUNDED_COLUMNS = 1024
PROJECTED_COLUMNS = 16384  # of x and A, at once
PROJECTING_WARPS = 8


def run_codebook(x_MI: Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
    """A few tokens, centroids looked up in shared memory; y [M, O] in `out_dtype`, by default that of x."""
    spec, weight = packed.spec, packed.weight
    assert isinstance(weight, PackedCodebook)
    layout = weight.layout
    x_MI, projection_MR = _aligned_pairs(dense_rows(x_MI), layout), None
    if spec.rank:
        x_MI, projection_MR = prepare_activations(x_MI, packed)
    else:
        x_MI = round_activations(x_MI, packed.spec, ordered=False)
    m, n = len(x_MI), layout.rows
    y_MO = x_MI.new_empty(m, n, dtype=out_dtype)
    block_m = min(PROGRAM_TOKENS, 1 << (m - 1).bit_length())
    pdl = runtime.supports_pdl(x_MI)
    limit = {} if runtime.INTERPRETED or block_m not in REGISTERS else {"maxnreg": REGISTERS[block_m]}
    tile = tile_of(layout.compiled)
    codebook_product_kernel[-(-n // tile.rows), -(-m // block_m)](
        x_MI, weight.words, weight.table, packed.bias_O, projection_MR, packed.b_codes, packed.b_exponents, y_MO,
        m, n, layout.columns, x_MI.stride(0), rank=spec.rank, rounding=spec.rounding, b_block=spec.b_block,
        layout=layout.compiled, program=tile, FIELDS=min(layout.per_word, max(1, FIELDS_AT_ONCE // block_m)),
        BLOCK_M=block_m, pdl=pdl, num_warps=tile.warps, **runtime.launch_options(pdl), **limit,
    )  # fmt: skip
    return y_MO


def prepare_activations(x_MI: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor]:
    """A few tokens: x rounded (x itself if activations are not), and x_q A, float32 [M, RP], not rounded."""
    spec, (m, k) = packed.spec, x_MI.shape
    rounded_MI = x_MI.new_empty(m, k) if spec.rounding.bits else x_MI
    projection_MR = x_MI.new_empty(m, spec.rank, dtype=torch.float32)
    rounding_programs = -(-k // ROUNDED_COLUMNS) if spec.rounding.bits else 0
    pdl = runtime.supports_pdl(x_MI)
    block_k = min(PROJECTED_COLUMNS, triton.next_power_of_2(spec.layout.padded_columns))
    prepare_activations_kernel[spec.rank + rounding_programs, m](
        x_MI, packed.a_codes, packed.a_exponents, rounded_MI, projection_MR, k, x_MI.stride(0), rank=spec.rank,
        padded_columns=spec.layout.padded_columns, rounding=spec.rounding, a_block=spec.a_block, BLOCK_K=block_k,
        COLUMNS=ROUNDED_COLUMNS, pdl=pdl, num_warps=max(PROJECTING_WARPS, block_k // 1024),
        **runtime.launch_options(pdl),
    )  # fmt: skip
    return rounded_MI, projection_MR


def dequantize_codebook(weight: PackedCodebook, w_OI: Tensor) -> None:
    """Write the weight's values to w_OI."""
    layout = weight.layout
    tile = tile_of(layout.compiled)
    codebook_dequantize_kernel[-(-layout.rows // tile.rows), -(-layout.row_words // tile.words)](
        weight.words, weight.table, w_OI, layout.rows, layout.columns, layout=layout.compiled,
        program=tile, FIELDS=min(FIELDS_AT_ONCE, layout.per_word), num_warps=tile.warps,
    )  # fmt: skip


def _aligned_pairs(x_MI: Tensor, layout: CodebookLayout) -> Tensor:
    """x, copied if kernels read pairs of neighbours and these are not aligned to four bytes."""
    aligned = x_MI.data_ptr() % 4 == 0 and x_MI.stride(0) % 2 == 0
    return x_MI if aligned or not layout.filled else x_MI.clone(memory_format=torch.contiguous_format)
