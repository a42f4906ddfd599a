"""MXINT rounding on the device, bit for bit that of `lqer.formats.MXInt` with both scale roundings.

rounding: a packed.ActivationRounding, passed as a compile-time constant.

Shapes: M tokens, I in_features, O out_features, G blocks, B values of a block.
"""

import triton
import triton.language as tl

from lqer.kernels.runtime import INTERPRETED

INF_PATTERN = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
NAN_PATTERN = tl.constexpr(0x7FC00000)
LARGEST_POWER = tl.constexpr(0x7F000000)  # 2^127
SMALLEST_POWER = tl.constexpr(0x00800000)  # 2^-126
MANTISSA = tl.constexpr(0x007FFFFF)
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest_magnitude(x_GB, axis: tl.constexpr):
    """Bit pattern of the largest magnitude along `axis`; NaN counts as larger than infinity."""
    if INTERPRETED:
        return tl.max(x_GB.to(tl.int32, bitcast=True) & MAGNITUDE, axis=axis, keep_dims=True)
    else:
        return tl.reduce(tl.abs(x_GB), axis, _larger, keep_dims=True).to(tl.int32, bitcast=True)


@triton.jit
def mxint_codes(x_GB, axis: tl.constexpr, rounding: tl.constexpr):
    """Codes (as float32) and steps of float32 blocks along `axis`; the steps have length 1 along it.

    A block with NaN or infinity gets the step NaN.
    """
    fraction_bits: tl.constexpr = rounding.bits - 1 if rounding.ceil else rounding.bits - 2
    max_code: tl.constexpr = (1 << (rounding.bits - 1)) - 1
    largest = _largest_magnitude(x_GB, axis)
    if rounding.ceil:
        # Rounds up to a power of two: the sum carries into the exponent unless the mantissa is zero.
        power = tl.minimum((largest + MANTISSA) & INF_PATTERN, LARGEST_POWER)
        power = tl.maximum(power, SMALLEST_POWER)
    else:
        # A block of subnormal numbers becomes zero.
        power = tl.minimum(largest & INF_PATTERN, LARGEST_POWER)
        power = tl.where(power == 0, LARGEST_POWER, power)
    step = tl.where(largest >= INF_PATTERN, NAN_PATTERN, power).to(tl.float32, bitcast=True) * (2.0**-fraction_bits)
    # x / step = x * (2 / power) * 2^(fraction_bits - 1): 2 / power is always a normal float32, 1 / step is not.
    inverse = (-power + INF_PATTERN).to(tl.float32, bitcast=True)
    # The second product and the sum are one fused instruction; clamping keeps a rounded code an integer.
    codes = x_GB * inverse * (2.0 ** (fraction_bits - 1)) + ROUNDER
    codes = tl.minimum(tl.maximum(codes, ROUNDER - max_code), ROUNDER + max_code)
    return codes - ROUNDER, step


@triton.jit
def round_mxint(x_GB, axis: tl.constexpr, rounding: tl.constexpr):
    """Round float32 blocks along `axis` to MXINT values; a block with NaN or infinity becomes NaN."""
    codes, step = mxint_codes(x_GB, axis, rounding)
    return codes * step


@triton.jit
def round_columns(x_MI, rounding: tl.constexpr):
    """Round float32 [M, I] in blocks along I."""
    rows: tl.constexpr = x_MI.shape[0]
    columns: tl.constexpr = x_MI.shape[1]
    blocks = x_MI.reshape(rows, columns // rounding.block, rounding.block)
    return round_mxint(blocks, 2, rounding).reshape(rows, columns)


@triton.jit
def round_rows(x_OM, rounding: tl.constexpr):
    """Round float32 [O, M] in blocks along O."""
    rows: tl.constexpr = x_OM.shape[0]
    columns: tl.constexpr = x_OM.shape[1]
    blocks = x_OM.reshape(rows // rounding.block, rounding.block, columns)
    return round_mxint(blocks, 1, rounding).reshape(rows, columns)
