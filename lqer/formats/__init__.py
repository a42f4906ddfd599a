"""Number formats: the values that a tensor can take, and their cost in bits.

    quantized = MXInt(bits=4).quantize(weight_OI)      # codes and shared exponents
    quantized.dequantize()                             # their values in float32
    MXInt(bits=8).fake_quantize(activation_TI)         # the same rounding, without codes

This folder imports torch and lqer.components only. A new format is a file here, imported below.
"""

from collections.abc import Mapping
from typing import Any

from lqer.components import component_from_dict
from lqer.formats.base import NonFiniteError, NumberFormat, QuantizedTensor, pack_together
from lqer.formats.codebook import Codebook
from lqer.formats.cut import cut, join, unsupported_cut, without_first
from lqer.formats.e8p import E8P
from lqer.formats.integer import Int
from lqer.formats.mx import MX
from lqer.formats.mxint import MXInt
from lqer.formats.normalfloat import NormalFloat
from lqer.formats.packing import pack_bits, packed_length, unpack_bits
from lqer.formats.passthrough import Passthrough
from lqer.formats.trellis import Trellis

__all__ = [
    "E8P",
    "FORMATS",
    "MX",
    "Codebook",
    "Int",
    "MXInt",
    "NonFiniteError",
    "NormalFloat",
    "NumberFormat",
    "Passthrough",
    "QuantizedTensor",
    "Trellis",
    "cut",
    "format_from_dict",
    "join",
    "pack_bits",
    "pack_together",
    "packed_length",
    "unpack_bits",
    "unsupported_cut",
    "without_first",
]

FORMATS: dict[str, type[NumberFormat]] = NumberFormat.registry


def format_from_dict(fields: Mapping[str, Any]) -> NumberFormat:
    """The format that `NumberFormat.to_dict` described. Raises ValueError for an unknown kind, key or value."""
    return component_from_dict(NumberFormat, fields)
