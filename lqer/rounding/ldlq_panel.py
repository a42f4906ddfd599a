"""A panel of LDLQ's sweep (ldlq.py): block by block, or on a GPU in one launch where a kernel knows the codes.

Shapes: E matrices, O out_features, N rows of all matrices, P columns of a panel, G columns of a group, D columns of a
block, K blocks, V vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lqer.formats import E8P
from lqer.rounding.groups import Groups
from lqer.rounding.stack import add_products, rows_of_all

RoundPanel = Callable[[Tensor, Tensor, Tensor, int, Groups, int], tuple[dict[int, Tensor], Tensor]]


def panel_rounding(groups: Groups, block: int, on_gpu: bool) -> RoundPanel:
    """How panels are rounded in blocks of `block` columns: on a GPU by a kernel, if there is one for the codes."""
    if on_gpu and block == E8P.vector_size and isinstance(groups.number_format, E8P):
        return lattice_panel
    if on_gpu and block == 1 and (groups.evenly_spaced or groups.has_levels):
        return scalar_panel
    return block_by_block


def block_by_block(
    target_PEO: Tensor, weight_PEO: Tensor, lower_EPP: Tensor, start: int, groups: Groups, block: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Codes (N, V) of blocks by their first column, and errors (P, E, O), of the columns from `start` on.

    The target is changed.
    """
    codes: dict[int, Tensor] = {}
    error_PEO = torch.empty_like(target_PEO)
    for k in reversed(range(0, len(target_PEO), block)):
        now, column = slice(k, min(k + block, len(target_PEO))), start + k
        if now.stop == groups.columns(column).stop - start and not groups.is_fitted(column):
            _fit_last_group(target_PEO, weight_PEO, lower_EPP, start, groups, column)
        codes[column], values_ND = groups.round(column, rows_of_all(target_PEO[now]))
        error_PEO[now] = weight_PEO[now] - values_ND.T.unflatten(1, weight_PEO.shape[1:])
        add_products(target_PEO[:k], lower_EPP[:, now, :k], error_PEO[now])
    return codes, error_PEO


def _fit_last_group(
    target_PEO: Tensor, weight_PEO: Tensor, lower_EPP: Tensor, start: int, groups: Groups, column: int
) -> None:
    """The scale of the group that holds `column`, all columns after which are rounded."""
    columns = groups.columns(column)
    group = slice(columns.start - start, columns.stop - start)
    feedback_EGO = (target_PEO[group] - weight_PEO[group]).transpose(0, 1)
    moved_EGO = torch.linalg.solve_triangular(lower_EPP[:, group, group].mT, feedback_EGO, upper=True)
    groups.fit(column, rows_of_all(weight_PEO[group] + moved_EGO.transpose(0, 1)))


def lattice_panel(
    target_PEO: Tensor, weight_PEO: Tensor, lower_EPP: Tensor, start: int, groups: Groups, block: int
) -> tuple[dict[int, Tensor], Tensor]:
    """The same for lattice codes, one launch for each group and matrix; codes by first column of a launch."""
    from lqer.rounding.lattice_sweep import sweep_lattice_panel

    assert isinstance(groups.number_format, E8P)
    bits, rows = groups.number_format.bits, groups.matrices * groups.shape[0]

    def sweep(now: slice) -> tuple[dict[int, Tensor], Tensor]:
        scale_N = groups.scales(start + now.start)["scales"].to(torch.float32).flatten().expand(rows)
        of_each = [
            sweep_lattice_panel(target_PEO[now, e], weight_PEO[now, e], lower_EPP[e, now, now], scale_O, bits)
            for e, scale_O in enumerate(scale_N.view(groups.matrices, -1))
        ]
        codes = torch.cat([codes_KO.T for codes_KO, _ in of_each])
        return {start + now.start: codes}, torch.stack([error_PO for _, error_PO in of_each], dim=1)

    if groups.single:
        return sweep(slice(0, len(target_PEO)))
    return _group_by_group(sweep, target_PEO, weight_PEO, lower_EPP, start, groups)


def scalar_panel(
    target_PEO: Tensor, weight_PEO: Tensor, lower_EPP: Tensor, start: int, groups: Groups, block: int
) -> tuple[dict[int, Tensor], Tensor]:
    """The same for single values of known places: GPTQ's kernels, which walk the columns in reverse order."""
    from lqer.rounding.scalar_panel import sweep_scalars

    def sweep(now: slice) -> tuple[dict[int, Tensor], Tensor]:
        columns = [*range(start + now.stop - 1, start + now.start - 1, -1)]
        upper_EPP = -lower_EPP[:, now, now].flip(1, 2)
        upper_EPP.diagonal(dim1=1, dim2=2).fill_(1)
        moved_PEO, reference_PEO = target_PEO[now].flip(0), weight_PEO[now].flip(0)
        codes_PN, error_PEO = sweep_scalars(moved_PEO, upper_EPP, groups, columns, reference_PEO)
        return {start + now.start: codes_PN.flip(0).T}, error_PEO.flip(0)

    if groups.is_fitted(start):
        return sweep(slice(0, len(target_PEO)))
    return _group_by_group(sweep, target_PEO, weight_PEO, lower_EPP, start, groups)


def _group_by_group(
    sweep: Callable[[slice], tuple[dict[int, Tensor], Tensor]],
    target_PEO: Tensor,
    weight_PEO: Tensor,
    lower_EPP: Tensor,
    start: int,
    groups: Groups,
) -> tuple[dict[int, Tensor], Tensor]:
    """`sweep` over one group after the other, last to first, each once its scale is fitted."""
    codes: dict[int, Tensor] = {}
    error_PEO = torch.empty_like(target_PEO)
    for first in reversed(range(0, len(target_PEO), groups.width)):
        now = slice(first, min(first + groups.width, len(target_PEO)))
        if not groups.is_fitted(start + first):
            _fit_last_group(target_PEO, weight_PEO, lower_EPP, start, groups, start + first)
        group_codes, error_PEO[now] = sweep(now)
        codes |= group_codes
        add_products(target_PEO[:first], lower_EPP[:, now, :first], error_PEO[now])
    return codes, error_PEO
