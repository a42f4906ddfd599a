"""MXINT as LQER's published code computes it (arXiv 2402.02446), in float32, quirks included.

It differs from `lqer.formats.MXInt` in four ways:

- 1e-9 is added to every magnitude before scaling, which takes ties up where |x| < 2^-5;
- |x| <= 1e-8 is returned as it is;
- log2 M is rounded to float32 first, so a largest magnitude M one float32 unit above 2^20 counts as 2^20;
- M > 2^127 makes the shared scale overflow, and the block NaN.

Shapes: N blocks, B values of a block.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

TIE_BREAK = 1e-9
UNQUANTIZED = 1e-8


def lqer_values(x: Tensor, bits: int, block_size: int | str = 16, axis: int = -1) -> Tensor:
    """The float32 values of a float32 tensor, blocks along `axis`; block_size "row": the whole axis."""
    x_L = x.movedim(axis, -1)
    length = x_L.shape[-1]
    width = length if block_size == "row" else min(block_size, length)
    x_NB = pad(x_L, (0, -length % width)).unflatten(-1, (-1, width))
    largest_N1 = x_NB.abs().amax(-1, keepdim=True)
    exponent_N1 = largest_N1.double().log2().float().ceil().clamp(min=-126).double()
    exponent_N1 = torch.where(exponent_N1 > 127, torch.nan, exponent_N1)
    # A step of float32, as small as that of the smallest subnormal exponent.
    step_N1 = (2.0 ** (exponent_N1 - (bits - 1))).float()
    codes_NB = ((x_NB.abs() + TIE_BREAK) / step_N1).round().clamp(max=2 ** (bits - 1) - 1)
    values_NB = torch.copysign(codes_NB * step_N1, x_NB)
    values_NB = torch.where((x_NB.abs() <= UNQUANTIZED) & ~exponent_N1.isnan(), x_NB, values_NB)
    return values_NB.flatten(-2)[..., :length].movedim(-1, axis)
