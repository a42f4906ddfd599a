"""Sums of outer products over many tokens, in float64.

Chunks of tokens are summed in float32 and added to the float64 sum. That is exact enough for the order and size of the
batches not to matter: a sum differs from float64's by less than 1e-6 of sqrt(S_ii S_jj). Float32 inputs are multiplied
in full precision. Half-precision ones have exact products in float32; a GPU's tensor cores add these up
(products_kernel.py).

Shapes: I in_features, N tokens of a batch, P rows of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.statistics.symmetric import panels

# Tokens whose products are summed in float32 before the sum is added to a float64 one.
CHUNK_TOKENS = 512


def add_products(sum_II: Tensor, x_NI: Tensor, y_NI: Tensor | None = None) -> None:
    """Add Σ x yᵀ to a float64 sum; by default Σ x xᵀ, and on a GPU then to its lower triangle at least."""
    other_NI = x_NI if y_NI is None else y_NI
    if x_NI.is_cuda and x_NI.dtype == other_NI.dtype and x_NI.dtype in (torch.bfloat16, torch.float16):
        from lqer.statistics.products_kernel import add_half_products

        add_half_products(sum_II, x_NI.contiguous(), other_NI.contiguous(), lower=y_NI is None)
        return
    for first in range(0, len(x_NI), CHUNK_TOKENS):
        chunk = slice(first, first + CHUNK_TOKENS)
        products_II = x_NI[chunk].to(torch.float32).T @ other_NI[chunk].to(torch.float32)
        # In panels, because a CPU first widens the whole operand.
        for rows in panels(len(sum_II)):
            sum_II[rows] += products_II[rows]


def multiplicand(x_NI: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values as they are multiplied by inputs of that dtype: rounded to it if it is bfloat16, which is fast.

    The rounding averages out over the tokens. In float16 weighted values would underflow.
    """
    return x_NI.to(dtype) if dtype == torch.bfloat16 else x_NI


def symmetric_mean(sum_II: Tensor, total: float | Tensor) -> Tensor:
    """(S + Sᵀ) / 2 total, float32: a matrix product need not be symmetric to the last bit.

    By panels of rows: a second matrix in float64 would be larger than a large block's weights.
    """
    mean_II = torch.empty(sum_II.shape, dtype=torch.float32, device=sum_II.device)
    for rows in panels(len(sum_II)):
        mean_II[rows] = (sum_II[rows] + sum_II[:, rows].T) / (2 * total)
    return mean_II


def mirrored_mean(sum_II: Tensor, total: float | Tensor) -> Tensor:
    """The lower triangle of S / total on both sides of the diagonal, float32."""
    mean_II = torch.empty(sum_II.shape, dtype=torch.float32, device=sum_II.device)
    for rows in panels(len(sum_II)):
        mean_PI = (sum_II[rows, : rows.stop] / total).to(torch.float32)
        mean_II[rows, : rows.stop] = mean_PI
        mean_II[: rows.start, rows] = mean_PI[:, : rows.start].T
        # The square on the diagonal, whose upper half is not part of the sum.
        mean_II[rows, rows] = mean_PI[:, rows].tril() + mean_PI[:, rows].tril(-1).T
    return mean_II
