"""The randomized Hadamard transform of tokens, and around a product on packed weights (lqer.transforms.hadamard).

H_n = O ⊗ H_B with B a power of two and O orthonormal, the small factor with what is left of the power of two. So a
block of B outputs is one row of O times the input, B sums over all of it, and one H_B: every program makes one block,
and no program waits for another. Sums are float32, and normalised before they are added up.

Shapes: M tokens, K length, A blocks, B elements of a block, R rank.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .lattice_decode import token_order


@triton.jit
def _odd_overlap(size: tl.constexpr):
    """Where H_size is negative [size, size]: i & j have an odd number of bits in common."""
    bits = tl.arange(0, size)[:, None] & tl.arange(0, size)[None, :]
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return (bits & 1) != 0


@triton.jit
def _block(x_AB, row_A, negative_BB):
    """Block number i of H x, not normalised by sqrt(B); row_A: row i of O, float32."""
    v_B = tl.sum(x_AB * row_A[:, None], axis=0)
    return tl.sum(tl.where(negative_BB, -v_B[:, None], v_B[:, None]), axis=0)


@triton.jit
def transform_tokens_kernel(
    x,  # [M, K], rows `x_stride` apart
    signs,  # [K], or None: no transform
    outer,  # O, float32 [A, A]
    a_values,  # Aᵀ [RP, KP] in the dtype of x, or None
    x_out,  # [M, KP] in token order
    partial,  # float32 [A, M, RP], or None
    M,
    K,
    x_stride,
    rank: tl.constexpr,
    padded: tl.constexpr,  # KP
    A: tl.constexpr,
    BLOCK_A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    factor: tl.constexpr,  # of H_B
    chained: tl.constexpr,
):
    """x' = H (signs ⊙ x), or x itself, in token order, and what a block of it adds to x' A."""
    block, m = tl.program_id(0), tl.program_id(1)
    columns_B = block * B + tl.arange(0, B)
    blocks_A = tl.arange(0, BLOCK_A)
    dtype: tl.constexpr = x.dtype.element_ty
    if chained:
        # The product fetches its codes while this kernel still waits for its x.
        gdc_launch_dependents()
    # Of nothing that the kernel before makes.
    if signs is not None:
        row_A = tl.load(outer + block * A + blocks_A, mask=blocks_A < A, other=0.0) * factor
        place_AB = blocks_A[:, None] * B + tl.arange(0, B)[None, :]
        signs_AB = tl.load(signs + place_AB, mask=(blocks_A < A)[:, None], other=0.0)
        negative_BB = _odd_overlap(B)
    if rank > 0:
        a_RB = tl.load(a_values + tl.arange(0, BLOCK_R)[:, None] * padded + columns_B[None, :])
    if chained:
        gdc_wait()
    row = x + m.to(tl.int64) * x_stride
    if signs is not None:
        x_AB = tl.load(row + place_AB, mask=(blocks_A < A)[:, None], other=0.0) * signs_AB
        x_B = _block(x_AB.to(tl.float32), row_A, negative_BB).to(dtype)
    else:
        x_B = tl.load(row + columns_B, mask=columns_B < K, other=0.0)
    tl.store(x_out + m.to(tl.int64) * padded + token_order(columns_B), x_B)
    if rank > 0:
        for first in tl.static_range(0, rank, BLOCK_R):
            if first > 0:
                place = (first + tl.arange(0, BLOCK_R))[:, None] * padded + columns_B[None, :]
                a_RB = tl.load(a_values + place)
            sum_R = tl.sum(a_RB.to(tl.float32) * x_B.to(tl.float32)[None, :], axis=1)
            tl.store(partial + (block * M + m) * rank + first + tl.arange(0, BLOCK_R), sum_R)


@triton.jit
def restore_tokens_kernel(
    y,  # float32 [M, K]
    signs,  # [K]
    outer,  # Oᵀ, float32 [A, A]
    bias,  # [K], or None
    y_out,  # [M, K]
    M,
    A: tl.constexpr,
    BLOCK_A: tl.constexpr,
    B: tl.constexpr,
    factor: tl.constexpr,
    chained: tl.constexpr,
):
    """signs ⊙ Hᵀ y + bias."""
    block, m = tl.program_id(0), tl.program_id(1)
    columns_B = block * B + tl.arange(0, B)
    blocks_A = tl.arange(0, BLOCK_A)
    row_A = tl.load(outer + block * A + blocks_A, mask=blocks_A < A, other=0.0) * factor
    signs_B = tl.load(signs + columns_B).to(tl.float32)
    if bias is not None:
        bias_B = tl.load(bias + columns_B).to(tl.float32)
    negative_BB = _odd_overlap(B)
    if chained:
        gdc_wait()
        gdc_launch_dependents()
    place_AB = m.to(tl.int64) * (A * B) + blocks_A[:, None] * B + tl.arange(0, B)[None, :]
    y_AB = tl.load(y + place_AB, mask=(blocks_A < A)[:, None], other=0.0)
    y_B = _block(y_AB, row_A, negative_BB) * signs_B
    if bias is not None:
        y_B += bias_B
    tl.store(y_out + m.to(tl.int64) * (A * B) + columns_B, y_B.to(y_out.dtype.element_ty))
