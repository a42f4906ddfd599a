"""Values rounded to MXINT on a GPU in one pass over memory: the same numbers as in ten by `MXInt.round_blocks`.

Blocks of g neighbours along an axis are a contiguous tensor [N, g, R] reduced over g, R the elements behind the axis.
It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: N blocks of all leading dims, g values of a block, R elements behind the block's axis; L length of the axis.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program.
TILE = 4096
LARGEST_REST, LARGEST_BLOCK = 128, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF_PATTERN_C = tl.constexpr(0x7F800000)
MAGNITUDE_C = tl.constexpr(0x7FFFFFFF)
MANTISSA_C = tl.constexpr(0x007FFFFF)
LARGEST_POWER_C = tl.constexpr(0x7F000000)  # 2^127
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, ties to even.
ROUNDER_C = tl.constexpr(12582912.0)


def fits(x: Tensor, block: int, axis: int) -> bool:
    """Whether the kernel rounds blocks of that width along the axis: whole ones of a power of two, not too long."""
    whole = x.numel() > 0 and x.shape[axis] % block == 0
    return x.dtype in DTYPES and whole and block & (block - 1) == 0 and block <= LARGEST_BLOCK


def round_values(x: Tensor, block: int, axis: int, fraction_bits: int, ceil: bool, largest: int) -> Tensor:
    """X in its dtype, contiguous, with blocks along the axis, counted from 0, rounded to multiples of a step.

    The step is 2^(e - fraction_bits), e the exponent of the block's largest magnitude, rounded up if `ceil`; multiples
    lie within -largest .. largest.
    """
    x = x.contiguous()
    y, rest = torch.empty_like(x), math.prod(x.shape[axis + 1 :])
    blocks = x.numel() // (block * rest)
    at_once = min(triton.next_power_of_2(rest), LARGEST_REST)
    of_a_program = max(TILE // (block * at_once), 1)
    mxint_kernel[triton.cdiv(blocks, of_a_program), triton.cdiv(rest, at_once)](
        x, y, blocks, rest, fraction_bits=fraction_bits, ceil=ceil, largest=largest, BLOCK=block, BLOCKS=of_a_program,
        REST=at_once,
    )  # fmt: skip
    return y


# N changes from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["N"])
def mxint_kernel(
    x,  # [N, g, R]
    y,
    N,
    R,
    fraction_bits: tl.constexpr,
    ceil: tl.constexpr,
    largest: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    REST: tl.constexpr,
):
    blocks_N = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    rows_Ng = blocks_N.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside_Ng = (blocks_N < N)[:, None] & (rows_Ng >= 0)
    if REST == 1:
        # Two dimensions, so that the neighbours of a thread lie along the block.
        value_Ng = _rounded(tl.load(x + rows_Ng, mask=inside_Ng, other=0.0), fraction_bits, ceil, largest)
        tl.store(y + rows_Ng, value_Ng.to(y.dtype.element_ty), mask=inside_Ng)
    else:
        rest_R = tl.program_id(1) * REST + tl.arange(0, REST)
        place_NgR = rows_Ng[:, :, None] * R + rest_R[None, None, :]
        inside_NgR = inside_Ng[:, :, None] & (rest_R < R)[None, None, :]
        value_NgR = _rounded(tl.load(x + place_NgR, mask=inside_NgR, other=0.0), fraction_bits, ceil, largest)
        tl.store(y + place_NgR, value_NgR.to(y.dtype.element_ty), mask=inside_NgR)


@triton.jit
def _rounded(x, fraction_bits: tl.constexpr, ceil: tl.constexpr, largest: tl.constexpr):
    """float32 values of blocks along axis 1."""
    x = x.to(tl.float32)
    # Patterns of magnitudes order as the magnitudes do, NaN above infinity.
    most = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE_C, axis=1, keep_dims=True)
    if ceil:
        # The sum carries into the exponent unless the mantissa is zero: the next power of two.
        power = tl.minimum((most + MANTISSA_C) & INF_PATTERN_C, LARGEST_POWER_C)
    else:
        power = most & INF_PATTERN_C
    power = tl.where(power == 0, LARGEST_POWER_C, power)
    step = power.to(tl.float32, bitcast=True) * (2.0**-fraction_bits)
    code = (tl.div_rn(x, step + tl.zeros_like(x)) + ROUNDER_C) - ROUNDER_C
    value = tl.minimum(tl.maximum(code, -largest), largest) * step
    return tl.where(most >= INF_PATTERN_C, float("nan"), value)
