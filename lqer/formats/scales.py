"""Floating-point scales as they are stored.

Shapes: G blocks of all leading dims, g values of a block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ScaleDtype = Literal["float16", "bfloat16", "float32"]


def root_mean_square(x_Gg: Tensor) -> Tensor:
    """float64 root of the mean square [G] of float32 blocks [G, g]; squares do not overflow."""
    return torch.linalg.vector_norm(x_Gg, dim=-1, dtype=torch.float64) / x_Gg.shape[-1] ** 0.5


def storable(scales_G: Tensor, dtype: torch.dtype, largest_value: float) -> Tensor:
    """Scales in their storage dtype, limited so that scale * `largest_value` does not overflow float32.

    A positive scale that would underflow becomes the dtype's smallest positive number. Zero stays zero; NaN and
    infinity become NaN.
    """
    stored_G = positive(scales_G, dtype, torch.finfo(torch.float32).max / (2 * largest_value))
    stored_G.masked_fill_(scales_G == 0, 0)
    return stored_G.masked_fill_(~scales_G.isfinite(), torch.nan)


def positive(scales_G: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    """Scales in their storage dtype, from its smallest positive number to `largest` or its own largest; NaN stays."""
    limits = torch.finfo(dtype)
    return scales_G.clamp(limits.smallest_normal * limits.eps, min(limits.max, largest)).to(dtype)
