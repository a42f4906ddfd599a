"""Cutting an axis into blocks, and the power-of-two scale that a block can share.

`block_size` says which values share a scale: N neighbours along one axis; the whole axis, "row" (an output channel of a
weight, a token of an activation); or the whole "tensor", whose blocks are rows. An axis shorter than a block is one
block. A ragged last block is padded with zeros, which no format lets influence the other elements.

The shared scale is E8M0 (OCP MX v1.0, section 5.4.1): a byte s encodes 2^(s - 127), 255 for NaN. Exponents are taken
from the bits of the float32 pattern, since a float32 log2 rounds to the wrong integer next to large powers of two.

Shapes: L length of the axis, G blocks of all leading dims, g values of a block.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

BlockSize = int | Literal["row", "tensor"]

E8M0_NAN = 255
FLOAT32_MANTISSA_BITS = 23
FLOAT32_INF_PATTERN = 0x7F800000  # also the mask of the exponent field; any larger magnitude pattern is a NaN
FLOAT32_MAGNITUDE_MASK = 0x7FFFFFFF


def block_width(length: int, block_size: BlockSize) -> int:
    """Elements in a block of an axis of `length`: the block shrinks to an axis shorter than itself."""
    return length if isinstance(block_size, str) else min(block_size, length)


def block_count(length: int, block_size: BlockSize) -> int:
    """Blocks along an axis of `length`, a ragged last one included."""
    return -(-length // block_width(length, block_size))


def to_blocks(x_L: Tensor, block_size: BlockSize) -> Tensor:
    """View the last axis [..., L] as blocks [..., ceil(L / g), g]; copies only when the last block is ragged."""
    length = x_L.shape[-1]
    width = block_width(length, block_size)
    count = block_count(length, block_size)
    if count * width != length:
        x_L = pad(x_L, (0, count * width - length))
    return x_L.unflatten(-1, (count, width))


def from_blocks(x_Gg: Tensor, length: int) -> Tensor:
    """The inverse of `to_blocks`: [..., blocks, g] to [..., length], the padding dropped."""
    x_L = x_Gg.flatten(-2)
    return x_L if x_L.shape[-1] == length else x_L[..., :length].contiguous()


def scale_groups(x_Gg: Tensor, block_size: BlockSize) -> Tensor:
    """Blocks [G, g] regrouped so that the values of one scale come last: all of them, [1, .., 1, G g], for "tensor"."""
    if block_size != "tensor":
        return x_Gg
    ones = [1] * (x_Gg.dim() - 1)
    return x_Gg.reshape(*ones, -1) if x_Gg.numel() else x_Gg.new_zeros(*ones, 1)


def max_magnitude_pattern(x_Gg: Tensor) -> Tensor:
    """Largest |x| of each float32 block [G, g] as its int32 bit pattern [G].

    Patterns of non-negative floats order as the floats do, so the integer maximum is the maximum, and a NaN, being
    above infinity, wins. On the CPU the integer reduction takes half the time of `x.abs().amax(-1)`.
    """
    return (x_Gg.view(torch.int32) & FLOAT32_MAGNITUDE_MASK).amax(-1)


def e8m0_to_float(exponents_G: Tensor) -> Tensor:
    """uint8 E8M0 to float32 values: 2^(s - 127) exactly (2^-127 is a subnormal), NaN for 255."""
    pattern_G = exponents_G.to(torch.int32) << FLOAT32_MANTISSA_BITS
    pattern_G = pattern_G.clamp_(min=1 << (FLOAT32_MANTISSA_BITS - 1))  # byte 0: the subnormal 2^-127
    pattern_G += (exponents_G == E8M0_NAN).to(torch.int32) << (FLOAT32_MANTISSA_BITS - 1)  # infinity to quiet NaN
    return pattern_G.view(torch.float32)
