"""Matrices of one shape that are rounded at once: side by side, each with error feedback of its own.

The columns of W of all matrices lie next to each other, (I, E, O) in memory: to a number format and to a kernel that
walks columns they are one matrix of E O rows, to the products between panels a batch of E.

Shapes: E matrices, O out_features, I in_features, P columns of a panel, J other columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along a new first dimension; of one a view, since it may be as large as memory allows."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """A copy (I, E, O) of float32 weights (O, I), contiguous."""
    return torch.stack([weight_OI.T for weight_OI in weights], dim=1)


def rows_of_all(x_JEO: Tensor) -> Tensor:
    """The rows of all matrices, (E O, J), as a view."""
    return x_JEO.flatten(1).T


def add_products(y_JEO: Tensor, a_EPJ: Tensor, x_PEO: Tensor, alpha: float = 1.0) -> None:
    """y_e += alpha a_eᵀ x_e for every matrix e, in place."""
    if not (len(y_JEO) and len(x_PEO)):
        return
    if y_JEO.shape[1] == 1:
        y_JEO[:, 0].addmm_(a_EPJ[0].T, x_PEO[:, 0], alpha=alpha)
    else:
        y_JEO.transpose(0, 1).baddbmm_(a_EPJ.mT, x_PEO.transpose(0, 1), alpha=alpha)
