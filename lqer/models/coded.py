"""Tensors that a checkpoint stores as codes with scales, and the values that they stand for.

    quant_method   stored                                            stands for
    fp8            X float8 (.., O, I), X_scale_inv (.., G, H)       X = code times the scale of its block
                   X int8 (.., O, I / 2), X_scale_inv (.., G, H)     the same of E2M1, two codes a byte, as in mxfp4
    mxfp4          X_blocks uint8 (E, O, G, 16), X_scales (E, O, G)  X (E, I, O), I = 32 G, two codes a byte, the first
                                                                     in its low half, times 2^(scale - 127)

Mistral and DeepSeek-V4 have names of their own for scales. Scales of one byte are exponents there too. Blocks of FP8
are as config.json says (`weight_block_size`), the last ones cut off where the matrix ends. Where the scales are not of
such blocks, they divide the matrix evenly: one for all of it, or one for every 32 values of a row. transformers knows
only blocks that divide evenly.

Shapes: E experts, O out_features, I in_features, G and H rows and columns of the grid of scales.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lqer.errors import ModelError
from lqer.models.files import Header
from lqer.nn.stacked import Piece

QUANTIZATION_CONFIG = "quantization_config"
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
FP4_DTYPE = "I8"
# Scales of FP8 have the name of the codes and this suffix; Mistral's and DeepSeek-V4's end in these, not in "weight".
SCALE_SUFFIX, OTHER_SCALES = "_scale_inv", (".qscale_weight", ".scale")
# Fixed scales, by which inputs would be rounded. Here inputs are not rounded.
INPUT_SCALES = "activation_scale"
BLOCKS, SCALES = "_blocks", "_scales"
VALUES_OF_A_BYTE = 2
# OCP MX (v1.0), E2M1 by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127
# What a header says of decoded values: their dtype is the model's.
DECODED_DTYPE = "BF16"


class Scheme(Protocol):
    """How codes and scales become values."""

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the values, given that of the codes."""

    def decode(self, codes: Tensor, scales: Tensor, piece: Piece | None) -> Tensor:
        """The values, in float32. piece: one expert's linear of a stack; then (O, I)."""


@dataclass(frozen=True)
class Fp8:
    """block: rows and columns that share a scale, None where config.json names none."""

    block: tuple[int, int] | None

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return codes

    def decode(self, codes: Tensor, scales: Tensor, piece: Piece | None) -> Tensor:
        if piece is not None and piece.groups:
            return piece.of(self.decode(codes, scales, None))
        if piece is not None:
            expert_scales = scales[piece.expert] if scales.ndim == codes.ndim else scales
            values = self.decode(codes[piece.expert], expert_scales, None)
            return replace(piece, expert=0).of(values[None])
        scales, shape = _scale_values(scales), self.shape(tuple(codes.shape))
        if scales.numel() > 1:
            rows, columns = blocks_of(shape, scales.shape, self.block)
            scales = scales.repeat_interleave(rows, -2)[..., : shape[-2], :]
            scales = scales.repeat_interleave(columns, -1)[..., : shape[-1]]
        return self.unscaled(codes) * scales

    def unscaled(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)


@dataclass(frozen=True)
class Fp4(Fp8):
    """Values of E2M1, with scales as FP8 has them."""

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return (*codes[:-1], VALUES_OF_A_BYTE * codes[-1])

    def unscaled(self, codes: Tensor) -> Tensor:
        return _e2m1(codes.view(torch.uint8))


@dataclass(frozen=True)
class Mxfp4:
    """Blocks of 32 values of a row."""

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        experts, rows, groups, packed = codes
        return experts, groups * packed * VALUES_OF_A_BYTE, rows

    def decode(self, codes: Tensor, scales: Tensor, piece: Piece | None) -> Tensor:
        if piece is not None:
            # Codes are stored by outputs, while the stack that they stand for is transposed.
            rows = replace(piece, is_transposed=False)
            codes, scales = rows.of(codes), rows.of(scales)
        values = (_e2m1(codes) * _scale_values(scales).unsqueeze(-1)).flatten(-2)
        return values if piece is not None else values.transpose(-1, -2)


def _e2m1(codes: Tensor) -> Tensor:
    """The values (.., 2 n) of bytes (.., n), uint8, the first in the low half of each."""
    table = torch.tensor(E2M1, device=codes.device)
    return table[torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2).int()]


def _scale_values(scales: Tensor) -> Tensor:
    """The float32 values of scales, which may be stored as exponents."""
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - EXPONENT_BIAS)
    return scales.to(torch.float32)


def blocks_of(codes: tuple[int, ...], scales: tuple[int, ...], configured: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a block. Raises ValueError where the scales fit no blocks."""
    matrix, grid = codes[-2:], scales[-2:]
    if configured is not None and all(-(-n // b) == g for n, b, g in zip(matrix, configured, grid, strict=True)):
        return configured
    if len(grid) < 2 or any(n % g for n, g in zip(matrix, grid, strict=True)):
        raise ValueError(f"scales of shape {list(scales)} do not match codes of shape {list(codes)}")
    rows, columns = (n // g for n, g in zip(matrix, grid, strict=True))
    return rows, columns


@dataclass(frozen=True)
class Coded:
    """The names of codes and scales in the checkpoint, and what they are. shape: of the values."""

    codes: str
    scales: str
    scheme: Scheme
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """Values that are decoded where they are used: their codes take less room on the way there."""

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    piece: Piece | None

    def to(self, device: torch.device, non_blocking: bool = False) -> Encoded:
        codes, scales = (one.to(device, non_blocking=non_blocking) for one in (self.codes, self.scales))
        return replace(self, codes=codes, scales=scales)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.scheme.decode(self.codes, self.scales, self.piece).to(dtype).contiguous()


def is_coded(config: PreTrainedConfig) -> bool:
    """Whether tensors of the model's checkpoint may be stored as codes."""
    return getattr(config, QUANTIZATION_CONFIG, None) is not None


def coded_tensors(config: PreTrainedConfig, headers: Collection[Header]) -> dict[str, Coded]:
    """What is stored as codes, by the name of the values. Raises ModelError for scales that do not fit their codes."""
    if not is_coded(config):
        return {}
    quantization: Mapping[str, Any] = getattr(config, QUANTIZATION_CONFIG)
    shapes = {name: shape for header in headers for name, shape in header.shapes.items()}
    dtypes = {name: dtype for header in headers for name, dtype in header.dtypes.items()}
    if quantization["quant_method"] == "mxfp4":
        return dict(_mxfp4(shapes))
    block = quantization.get("weight_block_size")
    return dict(_fp8(shapes, dtypes, tuple(block) if block else None))


def _mxfp4(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Coded]]:
    scheme = Mxfp4()
    for codes, shape in shapes.items():
        name = codes.removesuffix(BLOCKS)
        scales = f"{name}{SCALES}"
        if codes.endswith(BLOCKS) and scales in shapes:
            if len(shape) != 4 or shapes[scales] != shape[:-1]:
                raise ModelError(f"model: {scales} has shape {list(shapes[scales])}, and {codes} {list(shape)}")
            yield name, Coded(codes, scales, scheme, scheme.shape(shape))


def _fp8(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], block: tuple[int, int] | None
) -> Iterator[tuple[str, Coded]]:
    for codes, stored in shapes.items():
        if dtypes[codes] not in (*FP8_DTYPES, FP4_DTYPE):
            continue
        names = (f"{codes}{SCALE_SUFFIX}", *(f"{codes.removesuffix('.weight')}{scale}" for scale in OTHER_SCALES))
        if (scales := next((name for name in names if name in shapes), None)) is None:
            continue
        scheme = Fp4(block) if dtypes[codes] == FP4_DTYPE else Fp8(block)
        shape = scheme.shape(stored)
        if any(size > 1 for size in shapes[scales]):
            try:
                blocks_of(shape, shapes[scales], scheme.block)
            except ValueError as error:
                raise ModelError(f"model: {codes}: {error}") from None
        yield codes, Coded(codes, scales, scheme, shape)


def plain_header(header: Header, coded: Mapping[str, Coded], config: PreTrainedConfig) -> Header:
    """A file's header as if it held values: without scales."""
    names = {one.codes: name for name, one in coded.items()}
    scales = {one.scales for one in coded.values()}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for stored, shape in header.shapes.items():
        if stored in names:
            name = names[stored]
            shapes[name], dtypes[name] = coded[name].shape, DECODED_DTYPE
        elif stored not in scales and not (is_coded(config) and stored.endswith(INPUT_SCALES)):
            shapes[stored], dtypes[stored] = shape, header.dtypes[stored]
    return Header(shapes, dtypes)


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration, changed in place, of a model whose weights are values."""
    vars(config).pop(QUANTIZATION_CONFIG, None)
    return config
