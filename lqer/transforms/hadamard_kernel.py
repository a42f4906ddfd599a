"""Randomized Hadamard transforms of half-precision vectors on a GPU, each token read and written once.

A vector of A B values, B a power of two, is the rows of a matrix X [A, B], and H = O ⊗ H_B (hadamard.py) two products:

    H x = O (X H_B) / sqrt(A B)        O and H_B not normalised: the entries of Hadamard matrices are 1 and -1

Products of X with 1 and -1 have no error on tensor cores, which sum in float32. The result is three bfloat16 numbers
each, without loss, as is O where it is no Hadamard matrix; parts of parts below float32's precision are left out. It
imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: T tokens, I features, A rows and B columns of a token, P parts of O; AP is A padded to a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.transforms.hadamard_factors import is_hadamard, small_order, two_factors

# Sides of X that a program holds in registers; tensor cores take no fewer than 16.
LEAST_SIDE, LARGEST_SIDE = 16, 128
# With more than FEW_TOKENS tokens, a program reads its matrices once for TOKENS_OF_A_PROGRAM of them.
TOKENS_OF_A_PROGRAM, FEW_TOKENS = 8, 256
SPLIT_C = tl.constexpr(3)  # bfloat16 numbers whose sum is a float32


@dataclass(frozen=True)
class Factors:
    """Not normalised. outer_PAA: parts of O, or of Oᵀ, padded with zeros, bfloat16; inner_BB: in the dtype of x."""

    outer_PAA: Tensor
    inner_BB: Tensor
    rows: int  # A


@lru_cache
def fits(length: int) -> bool:
    """Whether the kernel transforms vectors of this length."""
    columns = min(length // small_order(length), LARGEST_SIDE)
    rows = length // columns
    if not is_hadamard(length) and min(columns, triton.next_power_of_2(rows)) < LARGEST_SIDE:
        # ptxas 12.8, which comes with Triton 3.6, takes the places in shared memory of some products with the parts of
        # O from registers that hold something else: of 688 values an H200 reports an illegal memory access, which no
        # comparison with PyTorch survives. With 128 rows and columns it is right (11008).
        return False
    return columns >= LEAST_SIDE and rows <= LARGEST_SIDE


@lru_cache
@torch.inference_mode(False)
def factors_on(length: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> Factors:
    """The factors of H, or of Hᵀ; kept on the device, because a CUDA graph must not copy from the host."""
    outer_AA, inner_BB = two_factors(length, LARGEST_SIDE)
    rows, columns = len(outer_AA), len(inner_BB)
    padding = max(LEAST_SIDE, triton.next_power_of_2(rows)) - rows
    rest_AA = torch.nn.functional.pad((outer_AA.T if inverse else outer_AA) * rows**0.5, (0, padding, 0, padding))
    # The interpreter multiplies no bfloat16.
    of_outer, of_inner = (torch.bfloat16, dtype) if device.type == "cuda" else (torch.float32, torch.float32)
    parts: list[Tensor] = []
    while not parts or (len(parts) < SPLIT_C.value and rest_AA.abs().max() > torch.finfo(torch.float32).eps):
        parts.append(rest_AA.to(of_outer))
        rest_AA = rest_AA - parts[-1].to(torch.float64)
    return Factors(torch.stack(parts).to(device), (inner_BB * columns**0.5).round().to(device, of_inner), rows)


def transform(x_TI: Tensor, signs_I: Tensor, factors: Factors, signs_first: bool) -> Tensor:
    """H (s ⊙ x), or s ⊙ (H x), of each row in its dtype, bfloat16 or float16; signs in any float dtype."""
    rows_TI = x_TI.reshape(-1, x_TI.shape[-1])
    if rows_TI.stride(1) != 1:
        rows_TI = rows_TI.contiguous()
    tokens, length = rows_TI.shape
    y_TI = torch.empty(tokens, length, dtype=x_TI.dtype, device=x_TI.device)
    of_a_program = TOKENS_OF_A_PROGRAM if tokens > FEW_TOKENS else 1
    parts, padded, _ = factors.outer_PAA.shape
    columns = len(factors.inner_BB)
    hadamard_kernel[(triton.cdiv(tokens, of_a_program),)](
        rows_TI, signs_I, factors.outer_PAA, factors.inner_BB, y_TI, tokens, rows_TI.stride(0), factors.rows,
        length**-0.5, PADDED=padded, COLUMNS=columns, PARTS=parts, TOKENS=of_a_program, SIGNS_FIRST=signs_first,
        num_warps=8 if padded * columns > 1 << 12 else 4,
    )  # fmt: skip
    return y_TI.reshape(x_TI.shape)


# T changes from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["T"])
def hadamard_kernel(
    x,  # [T, I]
    signs,  # [I]
    outer,  # [P, AP, AP]
    inner,  # [B, B]
    y,  # [T, I]
    T,
    x_stride,  # between rows of x
    A,
    factor,
    PADDED: tl.constexpr,  # AP
    COLUMNS: tl.constexpr,  # B
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    SIGNS_FIRST: tl.constexpr,
):
    rows_A = tl.arange(0, PADDED)
    columns_B = tl.arange(0, COLUMNS)
    place_AB = rows_A[:, None] * COLUMNS + columns_B[None, :]
    place_AA = rows_A[:, None] * PADDED + rows_A[None, :]
    inside_AB = (rows_A < A)[:, None] & (columns_B >= 0)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    signs_AB = tl.load(signs + place_AB, mask=inside_AB, other=0.0).to(tl.float32)
    inner_BB = tl.load(inner + columns_B[:, None] * COLUMNS + columns_B[None, :])
    for i in range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        if token < T:
            x_AB = tl.load(x + token * x_stride + place_AB, mask=inside_AB, other=0.0)
            if SIGNS_FIRST:
                x_AB = (x_AB.to(tl.float32) * signs_AB).to(dtype)
            rest_AB = tl.dot(x_AB.to(inner.dtype.element_ty), inner_BB)
            sum_AB = tl.zeros((PADDED, COLUMNS), tl.float32)
            for part in tl.static_range(SPLIT_C):
                part_AB = rest_AB.to(outer.dtype.element_ty)
                for of_outer in tl.static_range(PARTS):
                    if part + of_outer < SPLIT_C:
                        outer_AA = tl.load(outer + of_outer * PADDED * PADDED + place_AA)
                        sum_AB = tl.dot(outer_AA, part_AB, sum_AB)
                rest_AB -= part_AB.to(tl.float32)
            y_AB = sum_AB * factor
            if not SIGNS_FIRST:
                y_AB = y_AB.to(dtype).to(tl.float32) * signs_AB
            tl.store(y + token * (A * COLUMNS) + place_AB, y_AB.to(dtype), mask=inside_AB)
