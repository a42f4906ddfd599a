"""The interface of a number format, and a tensor in one.

A format cuts an axis into blocks, fits scales to each block, and rounds every element to a code. `fit`, `encode` and
`decode` are those steps, separate so that error feedback and adaptive rounding can encode under fixed scales. They, and
the methods named `*_blocks` and `*_parts`, expect the block axis last; `quantize` and `QuantizedTensor` move it.
`quantize` is round-to-nearest with scales from the values alone; a rounding that fits scales or codes to the inputs of
a layer makes a QuantizedTensor of the same parts.

Shapes: L length of the block axis, G blocks of all leading dims, g values of a block, C candidates of a scale.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lqer.components import Component, is_as_before
from lqer.formats.blocks import BlockSize, block_count, from_blocks, to_blocks
from lqer.formats.packing import pack_bits, packed_length, unpack_bits
from lqer.formats.spacing import Levels, Spacing

# The length of the row that a format's bits are stated for: a typical hidden size.
NOMINAL_ROW = 4096


class NonFiniteError(ValueError):
    """A tensor to be quantized holds NaN or infinities; the message says how many of each."""


def check_finite(*tensors: Tensor) -> None:
    """Raise NonFiniteError unless every element of all tensors is finite. Synchronizes with their device, once."""
    if not torch.stack([torch.isfinite(x).all() for x in tensors]).all():
        nans, infinities = (sum(int(is_one(x).sum()) for x in tensors) for is_one in (torch.isnan, torch.isinf))
        raise NonFiniteError(f"{nans} NaN and {infinities} infinite of {sum(x.numel() for x in tensors)} values")


def require_block_size(value: Any, kind: str) -> None:
    """Raise ValueError unless `value` is "row", "tensor" or a positive integer."""
    if value in ("row", "tensor") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise ValueError(f'block_size {value!r} is not "row", "tensor" or an integer of at least 1 ({kind})')


class NumberFormat(Component, ABC, family="number format"):
    """The values that a tensor can take, and their cost in bits. Formats are frozen dataclasses deriving from this."""

    block_size: BlockSize  # elements along the axis that share a scale, or "row" or "tensor" (see blocks.py)
    vector_size: ClassVar[int] = 1  # neighbours along the axis that share a code; divides block_size
    vector_rows: ClassVar[int] = 1  # rows (of the leading dims) that share codes: their blocks are encoded together
    codebook_parts: ClassVar[frozenset[str]] = frozenset()  # metadata that are learned tables, which codes point into
    # Parts in a floating-point dtype that `dequantize_parts` is differentiable in: they can be trained, codes stay.
    trainable_parts: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def stream_widths(self) -> dict[str, int]:
        """Bits per code or scale of the parts stored as bit streams: "codes", and metadata narrower than a byte."""

    @property
    def code_offset(self) -> int:
        """Added to a code to store it unsigned (offset binary); 0 if codes are unsigned."""
        return 0

    @abstractmethod
    def bits_per_value(self, length: int) -> float:
        """Nominal bits per element, metadata included, for an axis of `length` (a ragged last block is a block)."""

    @property
    def nominal_bits(self) -> float:
        """Bits per value, metadata included, in a row of NOMINAL_ROW: the number that a format is named with."""
        return self.bits_per_value(NOMINAL_ROW)

    def scale_bits(self, bits: int, length: int) -> int:
        """Bits of the scales of an axis of `length`, at `bits` each; a scale of the whole tensor is not counted."""
        return 0 if self.block_size == "tensor" else bits * block_count(length, self.block_size)

    @abstractmethod
    def fit(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Scales of float32 blocks [G, g]: [G], or [1, .., 1] where `block_size` is "tensor".

        The scale of a block that holds NaN or infinity decodes to NaN.
        """

    def scale_candidates(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Scales [C, G] of finite float32 blocks [G, g] that a search chooses from; `fit(x_Gg)` is the first of them.

        `encode` and `decode` take them with x_Gg.unsqueeze(0). By default it is the only one.
        """
        return {name: part.unsqueeze(0) for name, part in self.fit(x_Gg).items()}

    @property
    def has_scale_candidates(self) -> bool:
        """Whether there is a scale besides that of `fit` to choose."""
        return type(self).scale_candidates is not NumberFormat.scale_candidates

    @abstractmethod
    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """Codes [G, g] of float32 blocks [G, g] under scales [G], saturating. g need not be the block size.

        With vectors of D there are [G, ceil(g / D)] codes; a ragged last vector is encoded as if padded with zeros.
        """

    @abstractmethod
    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 values [G, g] of codes [G, g] under scales [G]; whole vectors, g a multiple of D."""

    def spacing(self, scales: dict[str, Tensor]) -> Spacing | None:
        """The values under scales [G] where they are evenly spaced; None for other formats."""
        return None

    def fixed_levels(self, scales: dict[str, Tensor]) -> Levels | None:
        """The values under scales [G] where they are multiples of at most 256 fixed levels; None for other formats.

        A level of 0 stands for both zeros of a format with a sign.
        """
        return None

    def quantize(self, x: Tensor, axis: int = -1) -> "QuantizedTensor":
        """Quantize a float tensor of any dtype along `axis`, in float32.

        Raises NonFiniteError for NaN or infinity, ValueError for a tensor without an element along `axis`.
        """
        axis = _normalize_axis(x, axis)
        x_L = _axis_last(x, axis)
        check_finite(x_L)
        return QuantizedTensor(self, tuple(x.shape), axis, self.quantize_parts(x_L))

    def fake_quantize(self, x: Tensor, axis: int = -1) -> Tensor:
        """The values of `quantize(x, axis).dequantize(x.dtype)`, without codes, checks or device synchronization.

        For activations. NaN and infinity are not refused but turn their whole block into NaN. Carries no gradient.
        """
        axis = _normalize_axis(x, axis)
        x_L = _axis_last(x, axis)
        y_L = from_blocks(self.round_blocks(to_blocks(x_L, self.block_size)), x_L.shape[-1])
        return y_L.to(x.dtype).movedim(-1, axis).contiguous()

    def round_blocks(self, x_Gg: Tensor) -> Tensor:
        """A new tensor with `decode(encode(x))` of float32 blocks; formats override it with faster code."""
        scales = self.fit(x_Gg)
        return self.decode(self.encode(x_Gg, scales), scales)[..., : x_Gg.shape[-1]]

    def quantize_parts(self, x_L: Tensor) -> dict[str, Tensor]:
        """Codes [..., L] (one per vector) and metadata [..., blocks] of a finite float32 tensor [..., L]."""
        x_Gg = to_blocks(x_L, self.block_size)
        scales = self.fit(x_Gg)
        return {"codes": from_blocks(self.encode(x_Gg, scales), self.code_count(x_L.shape[-1])), **scales}

    def dequantize_parts(self, parts: dict[str, Tensor]) -> Tensor:
        """float32 values [..., L]: the inverse of `quantize_parts`, up to rounding; whole vectors."""
        codes_L = parts["codes"]
        codes_per_block = self.block_size if isinstance(self.block_size, str) else self.block_size // self.vector_size
        values_Gg = self.decode(to_blocks(codes_L, codes_per_block), parts)
        return from_blocks(values_Gg, codes_L.shape[-1] * self.vector_size)

    def pack_parts(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parts as stored: the narrow ones as uint8 bit streams, the others as they are."""
        packed = dict(parts)
        if self.code_offset:
            packed["codes"] = parts["codes"].view(torch.uint8) + self.code_offset  # uint8 wraps: -1 is 255, plus 8 is 7
        for name, width in self.stream_widths.items():
            packed[name] = pack_bits(packed[name], width)
        return packed

    def unpack_parts(self, packed: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """The inverse of `pack_parts` for an axis of `length`."""
        parts = dict(packed)
        for name, width in self.stream_widths.items():
            parts[name] = unpack_bits(packed[name], self.stream_length(name, length), width)
        if self.code_offset:
            parts["codes"] = (parts["codes"] - self.code_offset).view(torch.int8)
        return parts

    def stream_length(self, name: str, length: int) -> int:
        """Elements in a row of a part that is stored as a bit stream, for an axis of `length`."""
        return self.code_count(length) if name == "codes" else block_count(length, self.block_size)

    def trainable_values(self, rows: int, length: int) -> int:
        """Elements of the `trainable_parts` of a matrix with `rows` rows and a block axis of `length`."""
        if not self.trainable_parts:
            return 0
        return 1 if self.block_size == "tensor" else rows * block_count(length, self.block_size)

    @property
    def encoding_bytes(self) -> int:
        """The most bytes that `encode` holds besides its input and a few tensors of that size."""
        return 0

    def unsupported_shape(self, rows: int, length: int) -> str | None:
        """Why a matrix of `rows` by `length` along the axis has no codes; None if it has."""
        return None

    def code_count(self, length: int) -> int:
        """Codes of an axis of `length`."""
        return -(-length // self.vector_size)

    def unpack(self, packed: dict[str, Tensor], shape: Sequence[int], axis: int) -> "QuantizedTensor":
        """The inverse of `QuantizedTensor.pack`, without loss; `shape` and `axis` are those of the tensor."""
        axis = axis % len(shape)
        return QuantizedTensor(self, tuple(shape), axis, self.unpack_parts(packed, shape[axis]))

    def to_dict(self) -> dict[str, Any]:
        """`kind` and the fields, also those that are None; `format_from_dict` reads them."""
        kept = [one.name for one in dataclasses.fields(self) if not is_as_before(one, getattr(self, one.name))]
        return {"kind": self.kind, **{name: getattr(self, name) for name in kept}}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in a number format: codes, one per element or vector of elements, and the metadata to decode them."""

    format: NumberFormat
    shape: tuple[int, ...]  # of the dequantized tensor
    axis: int  # blocks run along it; >= 0
    # The axis moved last: "codes" [*lead, L], one per element or vector, and the format's metadata [*lead, blocks] or
    # [1, .., 1] where the whole tensor shares it; or the shapes that the format states.
    parts: dict[str, Tensor]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32, as a contiguous tensor of `shape`."""
        values_L = self.format.dequantize_parts(self.parts)[..., : self.shape[self.axis]]  # a last vector may be ragged
        return values_L.to(dtype).movedim(-1, self.axis).contiguous()

    def pack(self) -> dict[str, Tensor]:
        """The parts as stored: "codes" as a uint8 bit stream per row, metadata in its storage dtype."""
        return self.format.pack_parts(self.parts)

    @property
    def code_bits(self) -> int:
        """Bits of the packed codes, rows rounded up to whole bytes."""
        return self._stored_bits("codes")

    @property
    def metadata_bits(self) -> int:
        """Bits of all packed parts except the codes."""
        return sum(self._stored_bits(name) for name in self.parts if name != "codes")

    @property
    def codebook_bits(self) -> int:
        """Metadata bits of learned tables."""
        return sum(self._stored_bits(name) for name in self.parts if name in self.format.codebook_parts)

    @property
    def zero_bits(self) -> int:
        """Metadata bits of zero points."""
        return self._stored_bits("zeros") if "zeros" in self.parts else 0

    def _stored_bits(self, name: str) -> int:
        part = self.parts[name]
        if name not in self.format.stream_widths:
            return part.numel() * part.element_size() * 8
        rows = math.prod(part.shape[:-1])
        return rows * packed_length(part.shape[-1], self.format.stream_widths[name]) * 8


def pack_together(tensors: Sequence[QuantizedTensor]) -> list[dict[str, Tensor]]:
    """`pack` of tensors of one format and shape: their codes, which are packed row by row, at once."""
    if len(tensors) <= 1:
        return [one.pack() for one in tensors]
    stacked = {name: torch.stack([one.parts[name] for one in tensors]) for name in tensors[0].parts}
    packed = tensors[0].format.pack_parts(stacked)
    return [dict(zip(packed, of_one, strict=True)) for of_one in zip(*packed.values(), strict=True)]


def _normalize_axis(x: Tensor, axis: int) -> int:
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis {axis} is not an axis of a tensor of shape {tuple(x.shape)}")
    if x.shape[axis] == 0:
        raise ValueError(f"axis {axis} of a tensor of shape {tuple(x.shape)} has no element to quantize")
    return axis % x.dim()


def _axis_last(x: Tensor, axis: int) -> Tensor:
    """`x` in float32 with the block axis last, contiguous; shares memory with `x` if nothing changes."""
    return x.detach().movedim(axis, -1).contiguous().to(torch.float32)
