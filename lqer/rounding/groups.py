"""Groups of columns under one scale, in a sweep over the columns.

Groups run along in_features and so does the sweep: a group's scale is fitted when the sweep reaches the group, to the
weights after the error feedback so far, and then fixed. Or all scales are fitted in advance ("static groups"). A fit
is the format's own, or a search if the importance of every column is given. Of several matrices the rows follow each
other, those of one matrix together (rounding/stack.py).

Shapes: E matrices, O out_features, I in_features, N rows of all matrices, G columns of a group, D columns of a vector,
V vectors, L codes of a row, P columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import NumberFormat, QuantizedTensor
from lqer.formats.blocks import block_count, block_width
from lqer.formats.spacing import Levels, Spacing
from lqer.rounding.scale_search import searched_scales

T = TypeVar("T")

PANEL = 128  # columns whose feedback to later columns is one product


class Groups:
    """The scales of weights (O, I) in a format, fitted group by group.

    importance_EI: float32, what an error of a weight of each column costs; None where scales are the format's own fit.
    """

    def __init__(
        self,
        number_format: NumberFormat,
        out_features: int,
        in_features: int,
        importance_EI: Tensor | None = None,
        matrices: int = 1,
    ):
        self.number_format, self.matrices, self._importance_EI = number_format, matrices, importance_EI
        self.shape = (out_features, in_features)
        self.width = block_width(in_features, number_format.block_size)
        self._scales: list[dict[str, Tensor] | None] = [None] * block_count(in_features, number_format.block_size)

    @property
    def single(self) -> bool:
        """Whether the whole row is one group, fitted before there is any feedback."""
        return len(self._scales) == 1

    @property
    def panel(self) -> int:
        """Columns of a panel, near 128, such that no group extends over two panels."""
        unit = self.number_format.vector_size if self.single else self.width
        return max(PANEL // unit, 1) * unit

    @property
    def evenly_spaced(self) -> bool:
        """Whether the format's values are evenly spaced."""
        return type(self.number_format).spacing is not NumberFormat.spacing

    @property
    def has_levels(self) -> bool:
        """Whether the format's values are multiples of a few levels."""
        return type(self.number_format).fixed_levels is not NumberFormat.fixed_levels

    def is_fitted(self, column: int) -> bool:
        """Whether the group that holds `column` has its scale."""
        return self._scales[column // self.width] is not None

    def scales(self, column: int) -> dict[str, Tensor]:
        """The fitted scale of the group that holds `column`."""
        scales = self._scales[column // self.width]
        assert scales is not None
        return scales

    def spacing(self, columns: Sequence[int]) -> Spacing:
        """The spacing of fitted columns, of an evenly spaced format; step and zero point (columns, N)."""
        spacings = self._of_groups(self.number_format.spacing, columns)
        step_PO, zero_PO = (
            self._by_column({g: getattr(s, part) for g, s in spacings.items()}, columns)
            for part in ("step_G", "zero_G")
        )
        one = next(iter(spacings.values()))
        return Spacing(step_PO, zero_PO, one.min_code, one.max_code)

    def levels(self, columns: Sequence[int]) -> Levels:
        """The levels of fitted columns, of a format that has them; step (columns, N)."""
        levels = self._of_groups(self.number_format.fixed_levels, columns)
        step_PO = self._by_column({g: one.step_G for g, one in levels.items()}, columns)
        return replace(next(iter(levels.values())), step_G=step_PO)

    def _of_groups(self, read: Callable[[dict[str, Tensor]], T | None], columns: Sequence[int]) -> dict[int, T]:
        """What a format reads from the scales of each group that holds one of the columns."""
        groups = {column // self.width for column in columns}
        found = {group: read(self.scales(group * self.width)) for group in groups}
        return {group: one for group, one in found.items() if one is not None}

    def _by_column(self, of_group: dict[int, Tensor], columns: Sequence[int]) -> Tensor:
        """(columns, N) of (N, 1) or, where the one tensor has one, (1, 1) of each group."""
        rows = self.matrices * self.shape[0]
        runs = ((group, len([*run])) for group, run in groupby(column // self.width for column in columns))
        return torch.cat([of_group[group].T.expand(length, -1) for group, length in runs]).expand(-1, rows)

    def fit_all(self, weight_NI: Tensor) -> None:
        """Fit all scales to the weights before any feedback (static groups)."""
        for start in range(0, self.shape[1], self.width):
            self.fit(start, weight_NI[:, start : start + self.width])

    def fit(self, column: int, weight_NG: Tensor) -> None:
        """Fit the scale of the group that holds `column` to its weights, unless it has one."""
        if self._scales[column // self.width] is not None:
            return
        block_N1G = pad(weight_NG, (0, self.width - weight_NG.shape[1])).unsqueeze(1)
        by_row = self._importance_EI is None and self.number_format.block_size != "tensor"
        self._scales[column // self.width] = (
            self.number_format.fit(block_N1G) if by_row else self._fit_each(column, block_N1G)
        )

    def _fit_each(self, column: int, block_N1G: Tensor) -> dict[str, Tensor]:
        """Scales that depend on more than a row's weights: (1, 1), or (N, 1) of several matrices."""
        found = [self._fit_one(column, block_O1G, e) for e, block_O1G in enumerate(block_N1G.chunk(self.matrices))]
        if len(found) == 1:
            return found[0]
        return {name: torch.cat([one[name].expand(self.shape[0], -1) for one in found]) for name in found[0]}

    def _fit_one(self, column: int, block_O1G: Tensor, matrix: int) -> dict[str, Tensor]:
        if self._importance_EI is None:
            return self.number_format.fit(block_O1G)
        importance_G = self._importance_EI[matrix, self.columns(column)]
        padding = (0, self.width - len(importance_G))
        return searched_scales(self.number_format, block_O1G, pad(importance_G, padding))

    def columns(self, column: int) -> slice:
        """The columns of the group that holds `column`."""
        start = column // self.width * self.width
        return slice(start, min(start + self.width, self.shape[1]))

    def round(self, column: int, weight_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (N, V) and values (N, D) of whole vectors of one group, from `column` on, under its fixed scale."""
        scales = self.scales(column)
        codes_NV = self.number_format.encode(weight_ND.unsqueeze(1), scales)
        values_ND = self.number_format.decode(codes_NV, scales).squeeze(1)[:, : weight_ND.shape[1]]
        return codes_NV.squeeze(1), values_ND

    def finish(self, codes_NL: Tensor) -> list[QuantizedTensor]:
        """The quantized weights, once all groups are fitted."""
        parts = {
            name: torch.cat([group[name] for group in self._scales if group], dim=1) for name in self._scales[0] or {}
        }
        if self.number_format.block_size == "tensor":
            parts = {name: part[:: self.shape[0]] for name, part in parts.items()}
        parts["codes"] = codes_NL
        return [
            QuantizedTensor(self.number_format, self.shape, 1, dict(zip(parts, of_one, strict=True)))
            for of_one in zip(*(part.chunk(self.matrices) for part in parts.values()), strict=True)
        ]
