"""Weights as blocks of GGUF: 32 neighbours along a row with one scale, without loss.

    type     bytes of a block                                            value           holds
    Q4_0     float16 d, 16 of nibbles                                    d (u - 8)       integers in -8..7
    Q5_0     float16 d, 4 of high bits, 16 of nibbles                    d (u - 16)      -16..15
    Q8_0     float16 d, 32 of int8                                       d k             -128..127
    MXFP4    E8M0, 16 of nibbles                                         2^e e2m1        mx mxfp4_e2m1

Nibble j of a block holds element j in its low half and element j + 16 in its high half. Of the integer types the first
that holds every code - zero of the weight is taken; those with a minimum (Q4_1) round it and are not used.

Shapes: I in_features, O out_features, G blocks of a row, P bytes of a row.
"""

from __future__ import annotations

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from lqer.export.base import refuse_value
from lqer.export.integers import Integers, integers_of, unsupported_integers
from lqer.export.source import LinearSpec
from lqer.formats import MX, Int, QuantizedTensor
from lqer.formats.blocks import block_width

BLOCK = 32
HALF = BLOCK // 2
INTEGER_TYPES = {
    GGMLQuantizationType.Q4_0: 8,
    GGMLQuantizationType.Q5_0: 16,
    GGMLQuantizationType.Q8_0: 128,
}


def is_mxfp4(spec: LinearSpec) -> bool:
    """Whether a weight's blocks are those of GGUF's type MXFP4."""
    return isinstance(spec.format, MX) and spec.format.element == "mxfp4_e2m1" and spec.format.block_size == BLOCK


def unsupported_blocks(spec: LinearSpec) -> str | None:
    """Why no type of block can hold a weight; None if one can, as far as its format tells."""
    if spec.in_features % BLOCK:
        return f"{spec.in_features} inputs are not whole blocks of {BLOCK}"
    if is_mxfp4(spec):
        return None
    if (reason := unsupported_integers(spec.format)) is not None:
        return f"{reason}, and GGUF's other types have tables of their own"
    if isinstance(spec.format, Int):
        if spec.format.scale_dtype != "float16":
            return f"its scales are {spec.format.scale_dtype}, and those of GGUF's blocks float16"
        if spec.format.bits == 8 and not spec.format.symmetric:
            return "8-bit codes with a zero point do not fit int8"
    width = block_width(spec.in_features, spec.format.block_size)
    if width % BLOCK and (BLOCK % width or isinstance(spec.format, Int)):
        return f"groups of {width} do not share scales as blocks of {BLOCK} do"
    return None


def blocks_of(weight_OI: QuantizedTensor, spec: LinearSpec) -> tuple[GGMLQuantizationType, Tensor]:
    """The type, and uint8 rows [O, P] of blocks. Raises ExportError for values that no type holds."""
    if is_mxfp4(spec):
        codes_OGg = weight_OI.parts["codes"].unflatten(1, (-1, BLOCK))
        exponents_OG1 = weight_OI.parts["exponents"].unsqueeze(-1)
        return GGMLQuantizationType.MXFP4, torch.cat([exponents_OG1, _nibbles(codes_OGg)], dim=-1).flatten(1)
    values_OGg, scales_OG = _common_scales(integers_of(weight_OI), spec)
    half_OG = scales_OG.to(torch.float16)
    if not torch.equal(half_OG.to(torch.float32), scales_OG):
        raise refuse_value(spec, "a scale is not a float16, as those of GGUF's blocks are")
    low, high = (int(end) for end in values_OGg.aminmax())
    block_type = next((one for one, offset in INTEGER_TYPES.items() if -offset <= low and high < offset), None)
    if block_type is None:
        raise refuse_value(spec, f"integers from {low} to {high} under one scale of {BLOCK} values do not fit int8")
    unsigned_OGg = (values_OGg + INTEGER_TYPES[block_type]).to(torch.uint8)
    body = {
        GGMLQuantizationType.Q4_0: lambda: [_nibbles(unsigned_OGg)],
        GGMLQuantizationType.Q5_0: lambda: [_high_bits(unsigned_OGg >> 4), _nibbles(unsigned_OGg & 15)],
        GGMLQuantizationType.Q8_0: lambda: [values_OGg.to(torch.int8).view(torch.uint8)],
    }[block_type]()
    return block_type, torch.cat([half_OG.unsqueeze(-1).view(torch.uint8), *body], dim=-1).flatten(1)


def _common_scales(integers: Integers, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """Code - zero, int32 [O, G, 32], and the scales float32 [O, G] of blocks of 32."""
    values_OGg = integers.signed().to(torch.int32).unflatten(1, (-1, BLOCK))
    if integers.group % BLOCK == 0:
        return values_OGg, integers.regrouped(BLOCK).scales_OG
    # Smaller groups have powers of two: the largest of a block are multiples of the smallest.
    small_OGg = integers.scales_OG.unflatten(1, (-1, BLOCK // integers.group))
    used_OGg = values_OGg.unflatten(-1, (-1, integers.group)).any(dim=-1)
    scales_OG = small_OGg.masked_fill(~used_OGg, torch.inf).amin(-1)
    scales_OG = torch.where(scales_OG.isinf(), small_OGg.amin(-1), scales_OG)
    factors_OGg = torch.where(used_OGg, small_OGg / scales_OG.unsqueeze(-1), 1.0)
    if float(factors_OGg.max()) > INTEGER_TYPES[GGMLQuantizationType.Q8_0]:
        raise refuse_value(spec, f"the exponents of the groups of a block of {BLOCK} lie too far apart")
    return values_OGg * factors_OGg.to(torch.int32).repeat_interleave(integers.group, dim=-1), scales_OG


def _nibbles(codes_OGg: Tensor) -> Tensor:
    return codes_OGg[..., :HALF] | codes_OGg[..., HALF:] << 4


def _high_bits(bits_OGg: Tensor) -> Tensor:
    """One bit of each element of a block, element 0 lowest, as 4 bytes."""
    weights_8 = 1 << torch.arange(8)
    return (bits_OGg.unflatten(-1, (-1, 8)).to(torch.int64) * weights_8).sum(-1).to(torch.uint8)
