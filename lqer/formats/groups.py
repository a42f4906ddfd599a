"""Cutting a matrix into rectangular groups, each with a codebook of its own.

Shapes: R rows, L columns, G groups of g elements: a x b of them, of r x c elements.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from lqer.formats.blocks import block_count


@dataclass(frozen=True)
class Layout:
    """Groups of `group_rows` x `group_columns`, in row-major order; the last ones of each axis may be smaller."""

    rows: int
    length: int
    group_rows: int
    group_columns: int

    @property
    def row_groups(self) -> int:
        return block_count(self.rows, self.group_rows)

    @property
    def column_groups(self) -> int:
        return block_count(self.length, self.group_columns)

    def column_ranges(self) -> list[range]:
        """The columns of each group, in order."""
        starts = range(0, self.length, self.group_columns)
        return [range(start, min(start + self.group_columns, self.length)) for start in starts]

    def group(self, x_RL: Tensor, group_columns: int | None = None) -> Tensor:
        """[row_groups * column_groups, g] of a matrix [R, L], padded with zeros; rows of a group follow one another."""
        columns = group_columns or self.group_columns
        missing_columns = self.column_groups * columns - x_RL.shape[1]
        x_RL = pad(x_RL, (0, missing_columns, 0, self.row_groups * self.group_rows - self.rows))
        x_arbc = x_RL.unflatten(1, (self.column_groups, columns)).unflatten(0, (self.row_groups, self.group_rows))
        return x_arbc.transpose(1, 2).reshape(self.row_groups * self.column_groups, -1)

    def ungroup(self, x_Gg: Tensor, length: int | None = None) -> Tensor:
        """The inverse of `group`, the padding dropped: [R, length]."""
        x_arbc = x_Gg.unflatten(0, (self.row_groups, self.column_groups)).unflatten(2, (self.group_rows, -1))
        x_RL = x_arbc.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return x_RL[: self.rows, : length or self.length].contiguous()
