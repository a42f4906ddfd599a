"""Clipping: scales fitted to a narrower range than a group's own, so that its bulk is rounded more finely.

A group with values in [lo, hi] gets the scales of [c_lo lo, c_hi hi], 0 < c <= 1; the weights themselves stay as they
are and saturate. With c = 1 the scales are those of plain rounding. `search_clipping` is AWQ's automatic clipping
(arXiv 2306.00978): one c per group, the best of a few under the error of the group's partial products

    mean over tokens (x_g · w_g - x_g · Q_c(w_g))²  =  (w_g - Q_c(w_g)) E[x_g x_gᵀ] (w_g - Q_c(w_g))ᵀ

which needs no tokens, only the diagonal blocks of the autocorrelation.

Shapes: O out_features, I in_features, N groups of a row, B within a group, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.formats import NumberFormat, QuantizedTensor
from lqer.formats.blocks import block_count, block_width, from_blocks, to_blocks

# AWQ's: 1, 0.95, ... 0.55.
SHRINK_FACTORS = tuple(1 - i / 20 for i in range(10))


def group_range(weight_OI: Tensor, number_format: NumberFormat) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of every group, 0 included: float32 (O, N) each."""
    low_ON, high_ON = torch.aminmax(to_blocks(weight_OI.to(torch.float32), number_format.block_size), dim=-1)
    return low_ON.clamp(max=0), high_ON.clamp(min=0)


def quantize_clipped(
    weight_OI: Tensor, number_format: NumberFormat, low_factor_ON: Tensor, high_factor_ON: Tensor
) -> QuantizedTensor:
    """Round a weight to nearest under the scales of the narrowed ranges.

    The factors are in (0, 1]; a group of zeros has no range to narrow and stays zeros.
    """
    low_ON, high_ON = group_range(weight_OI, number_format)
    scales = number_format.fit(torch.stack([low_ON * low_factor_ON, high_ON * high_factor_ON], dim=-1))
    weight_ONB = to_blocks(weight_OI.to(torch.float32), number_format.block_size)
    codes_OI = from_blocks(number_format.encode(weight_ONB, scales), weight_OI.shape[1])
    return QuantizedTensor(number_format, tuple(weight_OI.shape), 1, {"codes": codes_OI, **scales})


def search_clipping(
    weight_OI: Tensor,
    autocorrelation_II: Tensor,
    number_format: NumberFormat,
    factors: tuple[float, ...] = SHRINK_FACTORS,
) -> Tensor:
    """The best factor of every group: float32 (O, N).

    autocorrelation_II: E[x xᵀ] up to scale, over all calibration tokens. Of equal factors the first wins.
    """
    blocks_NBB = _diagonal_blocks(autocorrelation_II.to(torch.float32), number_format.block_size)
    weight_OI = weight_OI.to(torch.float32)
    best_ON = torch.full((len(weight_OI), len(blocks_NBB)), factors[0], dtype=torch.float32, device=weight_OI.device)
    smallest_ON = torch.full_like(best_ON, torch.inf)
    for factor in factors:
        factor_ON = torch.full_like(best_ON, factor)
        rounded_OI = quantize_clipped(weight_OI, number_format, factor_ON, factor_ON).dequantize()
        error_NOB = to_blocks(weight_OI - rounded_OI, number_format.block_size).transpose(0, 1)
        error_ON = ((error_NOB @ blocks_NBB) * error_NOB).sum(-1).T
        better_ON = error_ON < smallest_ON
        best_ON[better_ON] = factor
        smallest_ON = torch.where(better_ON, error_ON, smallest_ON)
    return best_ON


def _diagonal_blocks(matrix_II: Tensor, block_size: int) -> Tensor:
    """The blocks [N, B, B] on the diagonal; a ragged last one is padded with zeros."""
    length = len(matrix_II)
    width = block_width(length, block_size)
    blocks_NBB = matrix_II.new_zeros(block_count(length, block_size), width, width)
    for n, block_BB in enumerate(blocks_NBB):
        part = matrix_II[n * width : (n + 1) * width, n * width : (n + 1) * width]
        block_BB[: len(part), : len(part)] = part
    return blocks_NBB
