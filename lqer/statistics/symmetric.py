"""Large symmetric matrices in place, by panels of rows: a second matrix of float64 may be more than a GPU holds.

Shapes: I rows and columns, P rows of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PANEL_ROWS = 512


def panels(size: int, width: int = PANEL_ROWS) -> Iterator[slice]:
    """The rows of each panel."""
    return (slice(first, min(first + width, size)) for first in range(0, size, width))


def symmetrize_(x_II: Tensor) -> Tensor:
    """(x + xᵀ) / 2 in place."""
    for rows in panels(len(x_II)):
        behind = slice(rows.start, None)
        mean_PI = (x_II[rows, behind] + x_II[behind, rows].T) / 2
        x_II[rows, behind] = mean_PI
        x_II[behind, rows] = mean_PI.T
    return x_II
