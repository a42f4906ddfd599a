"""Floating-point scales as they are stored: one per block, or one for a whole tensor.

Shapes: N = leading dims and blocks, B = within a block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lqer.components import require_choice

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ScaleDtype = Literal["float16", "bfloat16", "float32"]
Sharing = Literal["block", "tensor"]


def require_sharing(scale_per: str, block_size: int, scale_dtype: str, kind: str) -> None:
    """Raise ValueError unless the fields of a scale agree: one for the whole tensor leaves no block to choose."""
    require_choice("scale_per", scale_per, ["block", "tensor"], kind)
    require_choice("scale_dtype", scale_dtype, list(SCALE_DTYPES), kind)
    if scale_per == "tensor" and block_size != -1:
        raise ValueError(f"scale_per 'tensor' needs block_size -1, found {block_size} ({kind})")


def largest_magnitude(x_NB: Tensor, scale_per: Sharing) -> Tensor:
    """max|x| of each float32 block [N], or of all of them [1, .., 1]; NaN or infinity where a value is."""
    if scale_per == "block":
        return x_NB.abs().amax(-1)
    if x_NB.numel() == 0:
        return x_NB.new_zeros([1] * (x_NB.dim() - 1))
    return x_NB.abs().amax().reshape([1] * (x_NB.dim() - 1))


def root_mean_square(x_NB: Tensor, scale_per: Sharing) -> Tensor:
    """float64 rms of each float32 block [N], or of all of them [1, .., 1]; squares do not overflow."""
    if scale_per == "block":
        return torch.linalg.vector_norm(x_NB, dim=-1, dtype=torch.float64) / x_NB.shape[-1] ** 0.5
    norm = torch.linalg.vector_norm(x_NB, dtype=torch.float64) / max(x_NB.numel(), 1) ** 0.5
    return norm.reshape([1] * (x_NB.dim() - 1))


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
