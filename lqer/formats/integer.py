"""Uniform integers with a floating-point scale per group, the format of GPTQ and AWQ checkpoints.

With b bits and a group's values x, all arithmetic in float32 and rounding half to even:

    asymmetric   lo = min(x, 0), hi = max(x, 0)   s = (hi - lo) / (2^b - 1)        z = clamp(round(-lo / s), 0, 2^b - 1)
                 code = clamp(round(x / s) + z, 0, 2^b - 1)                        value = (code - z) * s
    symmetric    s = max|x| / (2^(b-1) - 1)
                 code = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)                 value = code * s

s is rounded to its storage dtype before any code is made, so the scale that codes were made for is the one that is
stored. A scale that would underflow becomes the dtype's smallest positive number, one that would overflow its largest
(or 2^(128 - b), so that no code decodes to infinity). A group of zeros decodes to zeros.

Shapes: L = length of the block axis, N = leading dims and groups, B = within a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.components import require_choice, require_range
from lqer.formats.base import NumberFormat, require_block_size
from lqer.formats.blocks import FLOAT32_INF_PATTERN, BlockSize, max_magnitude_pattern, scale_groups
from lqer.formats.scales import SCALE_DTYPES, ScaleDtype, positive


@dataclass(frozen=True)
class Int(NumberFormat):
    """Group-wise integers; parts: "codes" [*lead, L] (int8 if symmetric, else uint8), "scales" [*lead, groups] in
    `scale_dtype` and, unless symmetric, uint8 "zeros" [*lead, groups], stored in `bits` bits each.
    """

    kind = "int"

    bits: int
    block_size: BlockSize = 128
    symmetric: bool = False
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        require_range("bits", self.bits, 2, 8, "int")
        require_block_size(self.block_size, "int")
        require_choice("symmetric", self.symmetric, [False, True], "int")
        require_choice("scale_dtype", self.scale_dtype, list(SCALE_DTYPES), "int")

    @property
    def stream_widths(self) -> dict[str, int]:
        return {"codes": self.bits} if self.symmetric else {"codes": self.bits, "zeros": self.bits}

    @property
    def code_offset(self) -> int:
        return 1 << (self.bits - 1) if self.symmetric else 0

    @property
    def min_code(self) -> int:
        """The smallest code."""
        return -self.code_offset

    @property
    def max_code(self) -> int:
        """The largest code."""
        return self.min_code + (1 << self.bits) - 1

    def bits_per_value(self, length: int) -> float:
        scale_bits = SCALE_DTYPES[self.scale_dtype].itemsize * 8
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + self.scale_bits(scale_bits + zero_bits, length) / length

    def fit(self, x_NB: Tensor) -> dict[str, Tensor]:
        """Scales [N] in `scale_dtype` (NaN for a group with NaN or infinity) and, unless symmetric, zeros uint8 [N]."""
        groups_NB = scale_groups(x_NB, self.block_size)
        if self.symmetric:
            max_pattern_N = max_magnitude_pattern(groups_NB)
            scales_N = self.storable_scales(max_pattern_N.view(torch.float32) / self.max_code)
            return {"scales": scales_N.masked_fill_(max_pattern_N >= FLOAT32_INF_PATTERN, torch.nan)}
        low_N, high_N = torch.aminmax(groups_NB, dim=-1)
        low_N, high_N = low_N.clamp_(max=0), high_N.clamp_(min=0)
        scales_N = self.storable_scales((high_N - low_N) / self.max_code)
        scales_N.masked_fill_(~(low_N.isfinite() & high_N.isfinite()), torch.nan)
        zeros_N = (-low_N / scales_N.to(torch.float32)).round_().clamp_(0, self.max_code).to(torch.uint8)
        return {"scales": scales_N, "zeros": zeros_N}

    def encode(self, x_NB: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """Codes [N, B], int8 if symmetric, else uint8."""
        q_NB = (x_NB / scales["scales"].to(torch.float32).unsqueeze(-1)).round_()
        if not self.symmetric:
            q_NB.add_(scales["zeros"].unsqueeze(-1))
        return q_NB.clamp_(self.min_code, self.max_code).to(torch.int8 if self.symmetric else torch.uint8)

    def decode(self, codes_NB: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 (code - zero) * scale [N, B]."""
        values_NB = codes_NB.to(torch.float32)
        if not self.symmetric:
            values_NB = values_NB.sub_(scales["zeros"].unsqueeze(-1))
        return values_NB.mul_(scales["scales"].to(torch.float32).unsqueeze(-1))

    def round_blocks(self, x_NB: Tensor) -> Tensor:
        scales = self.fit(x_NB)
        step_NB = scales["scales"].to(torch.float32).unsqueeze(-1)
        y_NB = (x_NB / step_NB).round_()
        if self.symmetric:
            return y_NB.clamp_(self.min_code, self.max_code).mul_(step_NB)
        zeros_NB = scales["zeros"].to(torch.float32).unsqueeze(-1)
        return y_NB.add_(zeros_NB).clamp_(0, self.max_code).sub_(zeros_NB).mul_(step_NB)

    def storable_scales(self, scales_N: Tensor) -> Tensor:
        """Float32 scales in `scale_dtype`, positive and small enough that every code decodes to a finite value."""
        return positive(scales_N, SCALE_DTYPES[self.scale_dtype], 2.0 ** (128 - self.bits))
