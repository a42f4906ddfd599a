"""Scales of 4 bits for blocks of neighbours, evenly spaced in their logarithm (GPTVQ, arXiv 2402.15319, section 3.2).

    scale = 2^(offset + step * code)        offset and step in float16, one pair per column of blocks

A block's scale approximates its largest magnitude. The base of the logarithm does not matter.

Shapes: R rows, L columns, S blocks of columns, b elements of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.formats.blocks import block_width, from_blocks, to_blocks

SCALE_CODE_BITS = 4
LARGEST_SCALE_CODE = (1 << SCALE_CODE_BITS) - 1
SCALE_HEADER = torch.float16


def fit_log_scales(x_RL: Tensor, block_size: int) -> dict[str, Tensor]:
    """uint8 "scale_codes" [R, S], float16 "scale_offsets" and "scale_steps" [S] of a finite float32 matrix.

    A column of blocks spans its codes from its smallest to its largest scale. Blocks of zeros take the smallest: any
    scale would do for them, and they must not widen the range.
    """
    largest_RS = to_blocks(x_RL, block_size).abs().amax(-1)
    is_zero_RS = largest_RS == 0
    log_RS = largest_RS.log2()
    low_S = log_RS.masked_fill(is_zero_RS, torch.inf).amin(0)
    low_S = low_S.where(low_S.isfinite(), 0.0)  # a column of zeros
    offset_S = low_S.to(SCALE_HEADER)
    step_S = ((log_RS.amax(0) - offset_S) / LARGEST_SCALE_CODE).clamp(min=0).to(SCALE_HEADER)
    codes_RS = (log_RS - offset_S) / step_S.to(torch.float32).where(step_S > 0, 1.0)
    codes_RS = codes_RS.masked_fill(is_zero_RS, 0.0).round_().clamp_(0, LARGEST_SCALE_CODE)
    return {"scale_codes": codes_RS.to(torch.uint8), "scale_offsets": offset_S, "scale_steps": step_S}


def decode_log_scales(scales: dict[str, Tensor], rows: int, length: int, block_size: int) -> Tensor:
    """float32 scale [rows, length] of each element of a matrix."""
    codes_RS = scales["scale_codes"].reshape(rows, -1).to(torch.float32)
    scale_RS = (scales["scale_offsets"].to(torch.float32) + scales["scale_steps"].to(torch.float32) * codes_RS).exp2()
    scale_RSb = scale_RS.unsqueeze(-1).expand(-1, -1, block_width(length, block_size))
    return from_blocks(scale_RSb, length)
