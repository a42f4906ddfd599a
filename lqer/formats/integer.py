"""Uniform integers with a floating-point scale per group, the format of GPTQ and AWQ checkpoints.

With b bits and a group's values x, all arithmetic in float32 and rounding half to even:

    asymmetric   lo = min(x, 0), hi = max(x, 0)   s = (hi - lo) / (2^b - 1)        z = clamp(round(-lo / s), 0, 2^b - 1)
                 code = clamp(round(x / s) + z, 0, 2^b - 1)                        value = (code - z) * s
    symmetric    s = max|x| / (2^(b-1) - 1)
                 code = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)                 value = code * s

s is rounded to its storage dtype before any code is made, so the scale that codes were made for is the one that is
stored. A scale that would underflow becomes the dtype's smallest positive number, one that would overflow its largest
(or 2^(128 - b), so that no code decodes to infinity). A group of zeros decodes to zeros.

A search of scales (`scale_candidates`) shrinks lo and hi, or max|x|, by each factor of an even grid from 1 down.

Shapes: L length of the block axis, G groups of all leading dims, g values of a group, C candidates of a scale.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lqer.components import require_choice, require_range
from lqer.formats.base import NumberFormat, require_block_size
from lqer.formats.blocks import FLOAT32_INF_PATTERN, BlockSize, max_magnitude_pattern, scale_groups
from lqer.formats.scales import SCALE_DTYPES, ScaleDtype, positive
from lqer.formats.spacing import Spacing

# For each width: how many factors shrink a group's range, and the smallest. Wider codes lose more by clipping than they
# gain.
SHRINK_GRIDS = {2: (15, 0.3), 3: (15, 0.5), 4: (13, 0.7), 5: (9, 0.8), 6: (5, 0.9), 7: (3, 0.95), 8: (3, 0.95)}


@dataclass(frozen=True)
class Int(NumberFormat):
    """Group-wise integers; parts: "codes" [*lead, L] (int8 if symmetric, else uint8), "scales" [*lead, groups] in
    `scale_dtype` and, unless symmetric, uint8 "zeros" [*lead, groups], stored in `bits` bits each.
    """

    kind = "int"
    trainable_parts: ClassVar[frozenset[str]] = frozenset({"scales"})

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

    def fit(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Scales [G] in `scale_dtype` (NaN for a group with NaN or infinity) and, unless symmetric, zeros uint8 [G]."""
        return self._scales(*self._range(x_Gg))

    def scale_candidates(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Scales [C, G] and, unless symmetric, zeros [C, G], of the range shrunk by each factor of a grid."""
        count, smallest = SHRINK_GRIDS[self.bits]
        low_G, high_G = self._range(x_Gg)
        factors_C = torch.linspace(1.0, smallest, count, device=x_Gg.device).view(-1, *[1] * high_G.dim())
        return self._scales(low_G * factors_C, high_G * factors_C)

    def _range(self, x_Gg: Tensor) -> tuple[Tensor, Tensor]:
        """Lo and hi [G]; -max|x| and max|x| if symmetric. NaN or infinite where a value is."""
        groups_Gg = scale_groups(x_Gg, self.block_size)
        if self.symmetric:
            pattern_G = max_magnitude_pattern(groups_Gg)
            high_G = pattern_G.view(torch.float32).masked_fill(pattern_G >= FLOAT32_INF_PATTERN, torch.inf)
            return -high_G, high_G
        low_G, high_G = torch.aminmax(groups_Gg, dim=-1)
        return low_G.clamp_(max=0), high_G.clamp_(min=0)

    def _scales(self, low_G: Tensor, high_G: Tensor) -> dict[str, Tensor]:
        """The scale and, unless symmetric, the zero point with which the codes span a range."""
        span_G = high_G if self.symmetric else high_G - low_G
        scales_G = self.storable_scales(span_G / self.max_code)
        scales_G.masked_fill_(~(low_G.isfinite() & high_G.isfinite()), torch.nan)
        if self.symmetric:
            return {"scales": scales_G}
        zeros_G = (-low_G / scales_G.to(torch.float32)).round_().clamp_(0, self.max_code).to(torch.uint8)
        return {"scales": scales_G, "zeros": zeros_G}

    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """Codes [G, g], int8 if symmetric, else uint8."""
        q_Gg = (x_Gg / scales["scales"].to(torch.float32).unsqueeze(-1)).round_()
        if not self.symmetric:
            q_Gg.add_(scales["zeros"].unsqueeze(-1))
        return q_Gg.clamp_(self.min_code, self.max_code).to(torch.int8 if self.symmetric else torch.uint8)

    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 (code - zero) * scale [G, g]."""
        values_Gg = codes_Gg.to(torch.float32)
        if not self.symmetric:
            values_Gg = values_Gg.sub_(scales["zeros"].unsqueeze(-1))
        return values_Gg.mul_(scales["scales"].to(torch.float32).unsqueeze(-1))

    def spacing(self, scales: dict[str, Tensor]) -> Spacing:
        step_G = scales["scales"].to(torch.float32)
        zero_G = torch.zeros_like(step_G) if self.symmetric else scales["zeros"].to(torch.float32)
        return Spacing(step_G, zero_G, self.min_code, self.max_code)

    def round_blocks(self, x_Gg: Tensor) -> Tensor:
        scales = self.fit(x_Gg)
        step_Gg = scales["scales"].to(torch.float32).unsqueeze(-1)
        y_Gg = (x_Gg / step_Gg).round_()
        if self.symmetric:
            return y_Gg.clamp_(self.min_code, self.max_code).mul_(step_Gg)
        zeros_Gg = scales["zeros"].to(torch.float32).unsqueeze(-1)
        return y_Gg.add_(zeros_Gg).clamp_(0, self.max_code).sub_(zeros_Gg).mul_(step_Gg)

    def storable_scales(self, scales_G: Tensor) -> Tensor:
        """Float32 scales in `scale_dtype`, positive and small enough that every code decodes to a finite value."""
        return positive(scales_G, SCALE_DTYPES[self.scale_dtype], 2.0 ** (128 - self.bits))
