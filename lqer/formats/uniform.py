"""Uniform levels under the largest magnitude, for low-rank factors: CALDERA's `uniform` quantizer (arXiv 2405.18886).

    s    = max|x| / (2^(bits-1) - 1)                     per block, or one per tensor as CALDERA takes it for L and R
    code = clamp(round(x / s), -c, c),  value = code * s   c = 2^(bits-1) - 1, half to even

So only 2^bits - 1 of the 2^bits codes are used: three levels at 2 bits. Beside `int` with `symmetric`, which has the
same levels, this format can have one scale for a whole matrix.

Shapes: L = length of the block axis, N = leading dims and blocks, B = within a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.components import require_range
from lqer.formats.base import NumberFormat, require_block_size
from lqer.formats.blocks import block_count
from lqer.formats.scales import SCALE_DTYPES, ScaleDtype, Sharing, largest_magnitude, require_sharing, storable


@dataclass(frozen=True)
class Uniform(NumberFormat):
    """Symmetric uniform levels; parts: int8 "codes" [*lead, L] and "scales" in `scale_dtype`, [*lead, blocks], or
    [1, .., 1] where `scale_per` is "tensor".
    """

    kind = "uniform"

    bits: int
    block_size: int = 64
    scale_per: Sharing = "block"
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        require_range("bits", self.bits, 2, 8, "uniform")
        require_block_size(self.block_size, "uniform")
        require_sharing(self.scale_per, self.block_size, self.scale_dtype, "uniform")

    @property
    def stream_widths(self) -> dict[str, int]:
        return {"codes": self.bits}

    @property
    def code_offset(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code; the smallest is its negative."""
        return self.code_offset - 1

    def bits_per_value(self, length: int) -> float:
        """Codes and block scales; the one scale of a tensor is left out."""
        if self.scale_per == "tensor":
            return self.bits
        return self.bits + SCALE_DTYPES[self.scale_dtype].itemsize * 8 * block_count(length, self.block_size) / length

    def fit(self, x_NB: Tensor) -> dict[str, Tensor]:
        """Scales [N] or [1, .., 1]; 0 for zeros, NaN where there is NaN or infinity."""
        steps_N = largest_magnitude(x_NB, self.scale_per) / self.max_code
        return {"scales": storable(steps_N, SCALE_DTYPES[self.scale_dtype], self.max_code)}

    def encode(self, x_NB: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """int8 codes [N, B]; zero where the scale is 0 or NaN."""
        return self._round(x_NB, scales["scales"].to(torch.float32).unsqueeze(-1)).nan_to_num_(0).to(torch.int8)

    def decode(self, codes_NB: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 code * scale [N, B]."""
        return codes_NB.to(torch.float32).mul_(scales["scales"].to(torch.float32).unsqueeze(-1))

    def round_blocks(self, x_NB: Tensor) -> Tensor:
        step_NB = self.fit(x_NB)["scales"].to(torch.float32).unsqueeze(-1)
        return self._round(x_NB, step_NB).mul_(step_NB)

    def _round(self, x_NB: Tensor, step_NB: Tensor) -> Tensor:
        return (x_NB / torch.where(step_NB == 0, torch.inf, step_NB)).round_().clamp_(-self.max_code, self.max_code)
