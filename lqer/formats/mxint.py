"""MXINT: integer codes that share a power of two, the format of LQER (arXiv 2402.02446) and QERA (arXiv 2410.06040).

A block with largest magnitude M shares the exponent e; with p fraction bits its step is s = 2^(e - p):

    scale_rounding   e                p          differs when M is a power of two
    "ceil"           ceil(log2 M)     bits - 1   half the step, M itself saturates (4 bits: 1.0 -> 0.875)      LQER
    "floor"          floor(log2 M)    bits - 2   M is exact                                                    QERA, OCP

    levels           value            code k of x, saturated               k from .. to
    "mid-tread"      k s              round(x / s), half to even           -(2^(bits-1) - 1) .. 2^(bits-1) - 1
    "mid-rise"       (k + 1/2) s      floor(x / s)                         -2^(bits-1) .. 2^(bits-1) - 1

Mid-tread levels, those of the papers, leave one of the 2^bits codes unused, a quarter of them at 2 bits. Mid-rise
levels use all, have no zero, and reach the block's maximum to half a step; a value is still an integer of `bits` bits,
2 k + 1, times a power of two.

e is stored as E8M0. Byte 0 is a zero block: M = 0, and under "floor" also M < 2^-126 (QERA reads subnormals as zeros).
Exponents stay within -126..127, so under "ceil" a block with M > 2^127 saturates at its largest code. A zero block
decodes to zeros with either levels.

A search of scales (`scale_candidates`) tries e and the exponents below it, which clip the largest magnitudes.

Shapes: L length of the block axis, G blocks of all leading dims, g values of a block, C candidates of a scale.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lqer.components import ADDED, require_choice, require_range
from lqer.formats.agreement import agrees
from lqer.formats.base import NumberFormat, require_block_size
from lqer.formats.blocks import (
    E8M0_NAN,
    FLOAT32_INF_PATTERN,
    FLOAT32_MANTISSA_BITS,
    BlockSize,
    e8m0_to_float,
    max_magnitude_pattern,
    scale_groups,
)
from lqer.formats.spacing import Spacing

LARGEST_EXPONENT_PATTERN = 0x7F000000  # 2^127, the last power of two below infinity
LOWER_EXPONENTS = 2  # below that of `fit`, among the candidates of a search


@dataclass(frozen=True)
class MXInt(NumberFormat):
    """Block floating point with integer codes; parts: int8 "codes" [*lead, L], uint8 "exponents" [*lead, blocks]."""

    kind = "mxint"

    bits: int
    block_size: BlockSize = 16
    scale_rounding: Literal["ceil", "floor"] = "ceil"
    levels: Literal["mid-tread", "mid-rise"] = field(default="mid-tread", metadata=ADDED)

    def __post_init__(self) -> None:
        require_range("bits", self.bits, 2, 8, "mxint")
        require_block_size(self.block_size, "mxint")
        require_choice("scale_rounding", self.scale_rounding, ["ceil", "floor"], "mxint")
        require_choice("levels", self.levels, ["mid-tread", "mid-rise"], "mxint")

    @property
    def stream_widths(self) -> dict[str, int]:
        return {"codes": self.bits}

    @property
    def code_offset(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def mid_rise(self) -> bool:
        """Whether a code k stands for (k + 1/2) steps, not k."""
        return self.levels == "mid-rise"

    @property
    def min_code(self) -> int:
        """The smallest code."""
        return -self.max_code - 1 if self.mid_rise else -self.max_code

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def fraction_bits(self) -> int:
        """p: the step of a block with shared exponent e is 2^(e - p)."""
        return self.bits - 1 if self.scale_rounding == "ceil" else self.bits - 2

    def bits_per_value(self, length: int) -> float:
        return self.bits + self.scale_bits(8, length) / length

    def fit(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Shared exponents uint8 [G] (E8M0) of float32 blocks [G, g]."""
        return {"exponents": (self._shared_exponent(x_Gg) >> FLOAT32_MANTISSA_BITS).to(torch.uint8)}

    def scale_candidates(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Exponents [C, G]: that of `fit`, one and two lower; zero blocks and NaN blocks keep theirs."""
        exponents_G = self.fit(x_Gg)["exponents"]
        lower_C = torch.arange(LOWER_EXPONENTS + 1, device=x_Gg.device).view(-1, *[1] * exponents_G.dim())
        is_fixed_G = (exponents_G == 0) | (exponents_G == E8M0_NAN)
        candidates_CG = (exponents_G - lower_C).clamp_(min=1).to(torch.uint8)
        return {"exponents": torch.where(is_fixed_G, exponents_G, candidates_CG)}

    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """int8 codes [G, g]; blocks whose exponent is 0 (zero block) or 255 (NaN block) have codes of 0, or of mid-rise
        levels 0 and -1.
        """
        pattern_G = scales["exponents"].to(torch.int32) << FLOAT32_MANTISSA_BITS
        return self._round(x_Gg, self._step(pattern_G)).to(torch.int8)

    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 code * 2^(exponent - 127 - fraction_bits) [G, g], exact; NaN where the exponent is 255.

        Mid-rise: (code + 1/2) * that step, and 0 where the exponent is 0.
        """
        values_Gg = codes_Gg.to(torch.float32)
        if self.mid_rise:
            values_Gg.add_(0.5)
        return values_Gg.mul_(self._stored_step(scales).unsqueeze(-1))

    def spacing(self, scales: dict[str, Tensor]) -> Spacing:
        step_G = self._stored_step(scales)
        zero_G = torch.full_like(step_G, -0.5 if self.mid_rise else 0.0)
        return Spacing(step_G, zero_G, self.min_code, self.max_code)

    def _stored_step(self, scales: dict[str, Tensor]) -> Tensor:
        step_G = e8m0_to_float(scales["exponents"]).mul_(2.0**-self.fraction_bits)
        # No mid-rise level is zero: zero blocks must become so by their step.
        return step_G.masked_fill_(scales["exponents"] == 0, 0) if self.mid_rise else step_G

    def fake_quantize(self, x: Tensor, axis: int = -1) -> Tensor:
        if x.is_cuda and not self.mid_rise and isinstance(self.block_size, int) and -x.dim() <= axis < x.dim():
            from lqer.formats import mxint_kernel

            axis %= x.dim()
            block = min(self.block_size, x.shape[axis])
            if mxint_kernel.fits(x, block, axis) and self._kernel_agrees(block, axis == x.dim() - 1, x.dtype, x.device):
                return self._by_kernel(x.detach(), block, axis)
        return super().fake_quantize(x, axis)

    def _by_kernel(self, x: Tensor, block: int, axis: int) -> Tensor:
        from lqer.formats import mxint_kernel

        ceil = self.scale_rounding == "ceil"
        return mxint_kernel.round_values(x, block, axis, self.fraction_bits, ceil, self.max_code)

    def _kernel_agrees(self, block: int, in_rows: bool, dtype: torch.dtype, device: torch.device) -> bool:
        def values() -> Tensor:
            # Normal values, subnormal ones of float16, and zeros. An axis shorter than a block is one block.
            length = 2 * block if block == self.block_size else block
            x = torch.randn(48, length, generator=torch.Generator().manual_seed(0))
            x[16:32] *= 1e-6
            x[32:] = 0
            return (x if in_rows else x.T.contiguous()).to(device, dtype)

        kind = (self, block, in_rows, dtype, device)
        axis = 1 if in_rows else 0
        by_torch = super().fake_quantize
        return agrees(kind, lambda: self._by_kernel(values(), block, axis), lambda: by_torch(values(), axis), 0.0)

    def round_blocks(self, x_Gg: Tensor) -> Tensor:
        pattern_G = self._shared_exponent(x_Gg)
        step_G = self._step(pattern_G)
        values_Gg = self._round(x_Gg, step_G)
        if self.mid_rise:
            # As in `decode`: an infinite step makes NaN of code 0 alone.
            values_Gg.add_(0.5)
            step_G.masked_fill_(pattern_G == 0, 0).masked_fill_(pattern_G == FLOAT32_INF_PATTERN, torch.nan)
        return values_Gg.mul_(step_G.unsqueeze(-1))

    def _shared_exponent(self, x_Gg: Tensor) -> Tensor:
        """2^e of each block as an int32 float32 pattern [G]: 0 for a zero block, infinity for a NaN block."""
        max_G = max_magnitude_pattern(scale_groups(x_Gg, self.block_size))
        if self.scale_rounding == "floor":
            return max_G & FLOAT32_INF_PATTERN
        # Adding all mantissa bits carries into the exponent unless the mantissa is zero: the next power of two.
        ceil_G = (max_G + ((1 << FLOAT32_MANTISSA_BITS) - 1)) & FLOAT32_INF_PATTERN
        ceil_G.clamp_(max=LARGEST_EXPONENT_PATTERN)
        return ceil_G.masked_fill_(max_G >= FLOAT32_INF_PATTERN, FLOAT32_INF_PATTERN)

    def _step(self, pattern_G: Tensor) -> Tensor:
        """The float32 step 2^(e - p) [G] to divide by: huge for a zero block, so that every code is 0."""
        pattern_G = pattern_G.masked_fill(pattern_G == 0, LARGEST_EXPONENT_PATTERN)
        return pattern_G.view(torch.float32) * 2.0**-self.fraction_bits

    def _round(self, x_Gg: Tensor, step_G: Tensor) -> Tensor:
        """Codes as float32 [G, g], in a new tensor.

        Dividing by the step is exact down to subnormal steps, where multiplying by its inverse would overflow.
        """
        codes_Gg = x_Gg / step_G.unsqueeze(-1)
        codes_Gg = codes_Gg.floor_() if self.mid_rise else codes_Gg.round_()
        return codes_Gg.clamp_(self.min_code, self.max_code)
