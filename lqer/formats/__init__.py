"""Number formats: which values a tensor can take, and what they cost in bits.

    quantized = MXInt(bits=4).quantize(weight_OI)      # codes and shared exponents
    quantized.dequantize()                             # the values they stand for
    MXInt(bits=8).fake_quantize(activation_TI)         # the same rounding, without codes

This folder imports torch and the standard library only.
"""

from typing import Any, get_args

from lqer.formats.base import NonFiniteError, NumberFormat, QuantizedTensor, unsupported_cut, without_first
from lqer.formats.codebook import Codebook
from lqer.formats.e8p import E8P
from lqer.formats.integer import Int
from lqer.formats.mx import MX
from lqer.formats.mxint import MXInt
from lqer.formats.normalfloat import NormalFloat
from lqer.formats.packing import pack_bits, packed_length, unpack_bits
from lqer.formats.passthrough import Passthrough
from lqer.formats.uniform import Uniform

Format = MXInt | Int | MX | Passthrough | E8P | Uniform | NormalFloat | Codebook

__all__ = [
    "E8P",
    "MX",
    "Codebook",
    "Format",
    "Int",
    "MXInt",
    "NonFiniteError",
    "NormalFloat",
    "NumberFormat",
    "Passthrough",
    "QuantizedTensor",
    "Uniform",
    "format_from_dict",
    "pack_bits",
    "packed_length",
    "unpack_bits",
    "unsupported_cut",
    "without_first",
]

_FORMATS = {cls.kind: cls for cls in get_args(Format)}


def format_from_dict(fields: dict[str, Any]) -> NumberFormat:
    """The format that `NumberFormat.to_dict` described. Raises ValueError for an unknown kind, key or value."""
    kind = fields.get("kind")
    if kind not in _FORMATS:
        raise ValueError(f"format kind {kind!r} is not one of {', '.join(map(repr, _FORMATS))}")
    try:
        return _FORMATS[kind](**fields)
    except TypeError as error:  # an unknown or a missing field
        raise ValueError(f"{error} ({kind})") from error
