"""Levels at quantiles of the normal distribution under the largest magnitude, for weights that are nearly normal.

With M = 2^(bits-1), δ = (1/30 + 1/32) / 2 and the normal quantile function Φ⁻¹, the 2^bits levels are

    Φ⁻¹(p) / Φ⁻¹(1 - δ)   for p = M points evenly from δ to 1/2, then M + 1 points evenly from 1/2 to 1 - δ (1/2 once)

from -1 to 1, 0 among them, one more above 0 than below; the scale is max|x|. At 4 bits this is NF4 (QLoRA, arXiv
2305.14314). LoftQ (2310.08659, and QERA after it) and CALDERA's `normal` quantizer (2405.18886) have the same levels;
they differ in which one is nearest:

    nearest = "value"   the level closest to x / max|x|                            NF4, LoftQ: in blocks of 64
    nearest = "cdf"     the level whose p is closest to Φ(x Φ⁻¹(1 - δ) / max|x|)   CALDERA: L and R under one scale each

Shapes: L length of the block axis, G blocks of all leading dims, g values of a block, K levels.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lqer.components import require_choice, require_range
from lqer.formats.base import NumberFormat, require_block_size
from lqer.formats.blocks import BlockSize, scale_groups
from lqer.formats.scales import SCALE_DTYPES, ScaleDtype, storable
from lqer.formats.spacing import Levels

# Probability beyond the outermost levels on either side, as QLoRA sets it.
TAIL = (1 / 30 + 1 / 32) / 2


@dataclass(frozen=True)
class NormalFloat(NumberFormat):
    """Normal quantiles; parts: uint8 "codes" [*lead, L], from the lowest level up, and "scales" in `scale_dtype`,
    [*lead, blocks], or [1, .., 1] where `block_size` is "tensor".
    """

    kind = "normal-float"
    trainable_parts: ClassVar[frozenset[str]] = frozenset({"scales"})

    bits: int
    block_size: BlockSize = 64
    nearest: Literal["value", "cdf"] = "value"
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        require_range("bits", self.bits, 2, 8, "normal-float")
        require_block_size(self.block_size, "normal-float")
        require_choice("nearest", self.nearest, ["value", "cdf"], "normal-float")
        require_choice("scale_dtype", self.scale_dtype, list(SCALE_DTYPES), "normal-float")

    @property
    def stream_widths(self) -> dict[str, int]:
        return {"codes": self.bits}

    def bits_per_value(self, length: int) -> float:
        return self.bits + self.scale_bits(SCALE_DTYPES[self.scale_dtype].itemsize * 8, length) / length

    def fit(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Scales max|x|, [G] or [1, .., 1]; 0 for zeros, NaN where there is NaN or infinity."""
        scales_G = scale_groups(x_Gg, self.block_size).abs().amax(-1)
        return {"scales": storable(scales_G, SCALE_DTYPES[self.scale_dtype], 1.0)}

    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """uint8 codes [G, g]; that of level 0 where the scale is 0."""
        boundaries_K = torch.tensor(_boundaries(self.bits, self.nearest), device=x_Gg.device)
        scale_Gg = scales["scales"].to(torch.float32).unsqueeze(-1)
        share_Gg = (x_Gg / torch.where(scale_Gg == 0, torch.inf, scale_Gg)).contiguous()
        return torch.bucketize(share_Gg, boundaries_K).to(torch.uint8)

    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 level * scale [G, g]."""
        levels_K = torch.tensor(levels(self.bits), device=codes_Gg.device)
        return levels_K[codes_Gg.to(torch.int32)].mul_(scales["scales"].to(torch.float32).unsqueeze(-1))

    def fixed_levels(self, scales: dict[str, Tensor]) -> Levels:
        step_G = scales["scales"].to(torch.float32)
        return Levels(step_G, *_tables(self.bits, self.nearest, step_G.device))


@lru_cache
def _tables(bits: int, nearest: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, boundaries and codes, float32 and uint8, on a device."""
    codes_K = torch.arange(1 << bits, dtype=torch.uint8, device=device)
    return torch.tensor(levels(bits), device=device), torch.tensor(_boundaries(bits, nearest), device=device), codes_K


@lru_cache
def levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels, ascending."""
    return tuple(_value(p) for p in _probabilities(bits))


@lru_cache
def _boundaries(bits: int, nearest: str) -> tuple[float, ...]:
    """Values up to which a code's successor is not yet nearer: 2^bits - 1, ascending."""
    if nearest == "value":
        ascending = levels(bits)
        return tuple((low + high) / 2 for low, high in itertools.pairwise(ascending))
    ascending = _probabilities(bits)
    return tuple(_value((low + high) / 2) for low, high in itertools.pairwise(ascending))


def _probabilities(bits: int) -> tuple[float, ...]:
    half = 1 << (bits - 1)
    below = [TAIL + (0.5 - TAIL) * i / (half - 1) for i in range(half - 1)]
    above = [0.5 + (0.5 - TAIL) * i / half for i in range(half + 1)]
    return (*below, *above)


def _value(probability: float) -> float:
    if probability < 0.5:
        return -_value(1 - probability)  # the two halves would differ in their last digit
    return NormalDist().inv_cdf(probability) / NormalDist().inv_cdf(1 - TAIL)
