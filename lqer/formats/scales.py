"""Floating-point scales as they are stored.

Shapes: N = leading dims and blocks, B = within a block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ScaleDtype = Literal["float16", "bfloat16", "float32"]


def root_mean_square(x_NB: Tensor) -> Tensor:
    """float64 root of the mean square [N] of float32 blocks [N, B]; squares do not overflow."""
    return torch.linalg.vector_norm(x_NB, dim=-1, dtype=torch.float64) / x_NB.shape[-1] ** 0.5


def storable(scales_N: Tensor, dtype: torch.dtype, largest_value: float) -> Tensor:
    """Scales in their storage dtype, limited so that scale * `largest_value` does not overflow float32.

    A positive scale that would underflow becomes the dtype's smallest positive number. Zero stays zero; NaN and
    infinity become NaN.
    """
    stored_N = positive(scales_N, dtype, torch.finfo(torch.float32).max / (2 * largest_value))
    stored_N.masked_fill_(scales_N == 0, 0)
    return stored_N.masked_fill_(~scales_N.isfinite(), torch.nan)


def positive(scales_N: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    """Scales in their storage dtype, from its smallest positive number to `largest` or its own largest; NaN stays."""
    limits = torch.finfo(dtype)
    return scales_N.clamp(limits.smallest_normal * limits.eps, min(limits.max, largest)).to(dtype)
