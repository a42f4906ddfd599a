"""Which kernel walks the columns of a panel of single values: of evenly spaced ones, or of multiples of a few levels.

Shapes: P columns of a panel, O out_features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lqer.rounding.groups import Groups
from lqer.rounding.level_sweep import sweep_level_panel
from lqer.rounding.sweep import sweep_panel


def sweep_scalars(
    weight_PO: Tensor, upper_PP: Tensor, groups: Groups, columns: Sequence[int], reference_PO: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (P, O) and scaled errors (P, O) of the columns, all of fitted groups; arguments as for `sweep_panel`."""
    if groups.evenly_spaced:
        return sweep_panel(weight_PO, upper_PP, groups.spacing(columns), reference_PO)
    return sweep_level_panel(weight_PO, upper_PP, groups.levels(columns), reference_PO)
