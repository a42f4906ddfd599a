"""The weights of a linear as the integers that other formats of files are made of: value = (code - zero) * scale.

    lqer              code                       zero          scale
    mxint             code + 2^(b-1)             2^(b-1)       2^(exponent - 127 - p), see lqer/formats/mxint.py
    int, symmetric    code + 2^(b-1)             2^(b-1)       scales
    int, asymmetric   code                       zeros         scales
    mx mxint8         code + 128                 128           2^(exponent - 127 - 6)

Nothing is rounded on the way. Nothing depends on the scale of a group whose codes are all the zero point; an empty
block of MXINT gets 2^-14, which every floating-point type holds.

Shapes: I in_features, O out_features, G groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.export.base import refuse_value, unsupported_transposed
from lqer.export.source import LinearSpec, Outline
from lqer.formats import MX, Int, MXInt, NumberFormat, QuantizedTensor, pack_bits
from lqer.formats.blocks import block_width, e8m0_to_float

SCALE_OF_EMPTY_BLOCKS = 2.0**-14
# A scale for fewer weights would cost as much as the weights.
SMALLEST_GROUP = 16
WORD_BYTES = 4
# What vLLM's kernels for the layouts of GPTQ and AWQ take. None: one scale a row.
VLLM_GROUPS = (None, 32, 64, 128)


@dataclass(frozen=True)
class IntegerScheme:
    """Bits of a code, weights of a row that share a scale (None: all), and whether every zero is 2^(bits - 1)."""

    bits: int
    group: int | None
    symmetric: bool


@dataclass(frozen=True, eq=False)
class Integers:
    """Codes uint8 (O, I), zeros uint8 and scales float32 (O, G) of groups of `group`, the last of which may be ragged.

    scale_dtype: in which a reader that computes in it makes no error: bfloat16 for powers of two, else float32.
    """

    bits: int
    group: int
    codes_OI: Tensor
    zeros_OG: Tensor
    scales_OG: Tensor
    scale_dtype: torch.dtype

    def regrouped(self, group: int | None) -> Integers:
        """The same values in groups of a divisor of `group` that also divides I; None: as they are, of one a row."""
        if group is None:
            return self
        old_G = torch.arange(self.codes_OI.shape[1] // group) * group // self.group
        return replace(self, group=group, zeros_OG=self.zeros_OG[:, old_G], scales_OG=self.scales_OG[:, old_G])

    def signed(self) -> Tensor:
        """Code - zero, int16 (O, I)."""
        zeros_OI = self.zeros_OG.to(torch.int16).repeat_interleave(self.group, dim=1)
        return self.codes_OI.to(torch.int16) - zeros_OI[:, : self.codes_OI.shape[1]]


def unsupported_integers(number_format: NumberFormat) -> str | None:
    """Why values in this format are not integers times a scale; None if they are."""
    if isinstance(number_format, Int):
        return None
    if isinstance(number_format, MXInt):
        return "mid-rise levels have no zero" if number_format.mid_rise else None
    if isinstance(number_format, MX) and number_format.element == "mxint8":
        return None
    return f"{_name(number_format)} is not integers times a scale"


def _name(number_format: NumberFormat) -> str:
    return str(getattr(number_format, "element", number_format.kind))


def integers_of(weight_OI: QuantizedTensor) -> Integers:
    """The weight of a linear in a format that `unsupported_integers` accepts."""
    number_format, parts = weight_OI.format, weight_OI.parts
    out_features, in_features = weight_OI.shape
    bits = number_format.stream_widths["codes"]
    middle = 1 << (bits - 1)
    is_unsigned = isinstance(number_format, Int) and not number_format.symmetric
    codes_OI = parts["codes"] if is_unsigned else parts["codes"].view(torch.uint8) + middle & (1 << bits) - 1
    if isinstance(number_format, Int):
        scales, scale_dtype = parts["scales"].to(torch.float32), torch.float32
    else:
        fraction_bits = number_format.fraction_bits if isinstance(number_format, MXInt) else 6
        exponents = parts["exponents"]
        scales = (e8m0_to_float(exponents) * 2.0**-fraction_bits).masked_fill_(exponents == 0, SCALE_OF_EMPTY_BLOCKS)
        scale_dtype = torch.bfloat16
    scales_OG = scales.expand(out_features, -1)
    zeros_OG = parts["zeros"].expand(out_features, -1) if is_unsigned else torch.full_like(scales_OG, middle)
    width = block_width(in_features, number_format.block_size)
    return Integers(bits, width, codes_OI, zeros_OG.to(torch.uint8), scales_OG, scale_dtype)


def integer_schemes(specs: Iterable[LinearSpec]) -> dict[str, IntegerScheme]:
    """The scheme of every linear by name, with one group size for all linears of a format.

    Where the group does not divide in_features, it is the largest that divides both: scales are repeated.
    """
    specs = list(specs)
    groups: dict[NumberFormat, int | None] = {}
    for number_format in {spec.format for spec in specs}:
        widths = [spec.in_features for spec in specs if spec.format == number_format]
        size = number_format.block_size
        # One group a row is a scheme of its own wherever it is so for every linear.
        is_row = isinstance(size, str) or all(size >= width for width in widths)
        groups[number_format] = None if is_row else math.gcd(int(size), *widths)
    return {spec.name: _scheme(spec.format, groups[spec.format]) for spec in specs}


def _scheme(number_format: NumberFormat, group: int | None) -> IntegerScheme:
    symmetric = not isinstance(number_format, Int) or number_format.symmetric
    return IntegerScheme(number_format.stream_widths["codes"], group, symmetric)


def unsupported_group(spec: LinearSpec, scheme: IntegerScheme) -> str | None:
    """Why the linear cannot be cut into the groups of its scheme; None if it can."""
    if scheme.group is None or scheme.group >= SMALLEST_GROUP or scheme.group == spec.format.block_size:
        return None
    return (
        f"{spec.in_features} inputs are not whole groups of {spec.format.block_size} (nor of {SMALLEST_GROUP} or more "
        "that divide both)"
    )


def unsupported_uniform(model: Outline) -> tuple[str, str] | None:
    """A linear with another scheme than the first, which a layout with one scheme cannot hold, and why; or None."""
    schemes = integer_schemes(model.specs.values())
    first = next(iter(schemes.values()), None)
    for spec in model.specs.values():
        if (ragged := unsupported_group(spec, schemes[spec.name])) is not None:
            return spec.name, ragged
        if schemes[spec.name] != first:
            return spec.name, "its bits, groups or zero points are not those of the first linear"
    return unsupported_transposed(model)


def float16_scales(integers: Integers, spec: LinearSpec) -> Tensor:
    """Scales float16 (O, G). Raises ExportError, naming the linear, for a scale that is not one."""
    scales_OG = integers.scales_OG.to(torch.float16)
    if not torch.equal(scales_OG.to(torch.float32), integers.scales_OG):
        raise refuse_value(spec, "a scale is not a float16")
    return scales_OG


def unsupported_scales(spec: LinearSpec) -> str | None:
    """Why the scales of a linear cannot be float16; None if they can, as far as its format tells."""
    if isinstance(spec.format, Int) and spec.format.scale_dtype == "float32":
        return "its scales are float32, and the layout's are float16"
    return None


def words(codes_OI: Tensor, bits: int) -> Tensor:
    """int32 (O, ceil(I * bits / 32)): a little-endian stream of bits for each row, in whole words."""
    stream = pack_bits(codes_OI, bits)
    return pad(stream, (0, -stream.shape[1] % WORD_BYTES)).view(torch.int32)
