"""Tiles of 128 columns: how lattice and trellis codes are cut along the reduction dimension.

Shapes: O out_features, I in_features; P marks padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from lqer.kernels.layout.codes import ROW_PADDING

TILE_K = 128
# Tiles that a program reads at once: the largest of these that divides the number of tiles.
SPANS = (16, 8, 4, 2, 1)
# Tiles are padded to a multiple of a larger span only if that adds at most 5 %.
LARGEST_PADDING = 1.05


@dataclass(frozen=True)
class TiledLayout:
    """The shape of a weight [O, I] and of its tiles."""

    rows: int
    columns: int

    @cached_property
    def compiled(self) -> Self:
        """The layout without the number of rows: kernels are compiled once for all of these."""
        return replace(self, rows=0)

    @property
    def tiles(self) -> int:
        needed = -(-self.columns // TILE_K)
        return next(t for span in SPANS if (t := -(-needed // span) * span) <= LARGEST_PADDING * needed)

    @property
    def span(self) -> int:
        """Tiles that a program reads at once."""
        return next(span for span in SPANS if self.tiles % span == 0)

    @property
    def padded_columns(self) -> int:
        return self.tiles * TILE_K

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // ROW_PADDING) * ROW_PADDING
