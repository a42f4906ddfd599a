"""Which kernel walks the columns of a panel of single values: of evenly spaced ones, or of multiples of a few levels.

Shapes: E matrices, O out_features, N rows of all matrices, P columns of a panel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lqer.rounding.groups import Groups
from lqer.rounding.level_sweep import sweep_level_panel
from lqer.rounding.sweep import sweep_panel


def sweep_scalars(
    weight_PEO: Tensor, upper_EPP: Tensor, groups: Groups, columns: Sequence[int], reference_PEO: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (P, N) and scaled errors (P, E, O) of the columns, all of fitted groups; arguments as for `sweep_panel`."""
    if groups.evenly_spaced:
        codes_PN, error_PN = sweep_panel(weight_PEO, upper_EPP, groups.spacing(columns), reference_PEO)
    else:
        codes_PN, error_PN = sweep_level_panel(weight_PEO, upper_EPP, groups.levels(columns), reference_PEO)
    return codes_PN, error_PN.view(weight_PEO.shape)
