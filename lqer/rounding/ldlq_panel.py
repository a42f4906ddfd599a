"""A panel of LDLQ's sweep (ldlq.py): block by block, or on a GPU in one launch where a kernel knows the codes.

Shapes: O out_features, P columns of a panel, G columns of a group, D columns of a block, K blocks, V vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lqer.formats import E8P
from lqer.rounding.groups import Groups

RoundPanel = Callable[[Tensor, Tensor, Tensor, int, Groups, int], tuple[dict[int, Tensor], Tensor]]


def cpu_panel(groups: Groups, block: int) -> RoundPanel:
    return block_by_block


def gpu_panel(groups: Groups, block: int) -> RoundPanel:
    if block == E8P.vector_size and isinstance(groups.number_format, E8P):
        return lattice_panel
    is_scalar = block == 1 and (groups.evenly_spaced or groups.has_levels)
    return scalar_panel if is_scalar else block_by_block


def block_by_block(
    target_PO: Tensor, weight_PO: Tensor, lower_PP: Tensor, start: int, groups: Groups, block: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Codes (O, V) of blocks by their first column, and errors (P, O), of the columns from `start` on.

    The target is changed.
    """
    codes: dict[int, Tensor] = {}
    error_PO = torch.empty_like(target_PO)
    for k in reversed(range(0, len(target_PO), block)):
        now, column = slice(k, min(k + block, len(target_PO))), start + k
        if now.stop == groups.columns(column).stop - start and not groups.is_fitted(column):
            _fit_last_group(target_PO, weight_PO, lower_PP, start, groups, column)
        codes[column], values_OD = groups.round(column, target_PO[now].T)
        error_PO[now] = weight_PO[now] - values_OD.T
        target_PO[:k].addmm_(lower_PP[now, :k].T, error_PO[now])
    return codes, error_PO


def _fit_last_group(
    target_PO: Tensor, weight_PO: Tensor, lower_PP: Tensor, start: int, groups: Groups, column: int
) -> None:
    """The scale of the group that holds `column`, all columns after which are rounded."""
    columns = groups.columns(column)
    group = slice(columns.start - start, columns.stop - start)
    feedback_GO = target_PO[group] - weight_PO[group]
    moved_GO = torch.linalg.solve_triangular(lower_PP[group, group].T, feedback_GO, upper=True)
    groups.fit(column, (weight_PO[group] + moved_GO).T)


def lattice_panel(
    target_PO: Tensor, weight_PO: Tensor, lower_PP: Tensor, start: int, groups: Groups, block: int
) -> tuple[dict[int, Tensor], Tensor]:
    """The same for lattice codes, one launch for each group; codes by first column of a launch."""
    from lqer.rounding.lattice_sweep import sweep_lattice_panel

    assert isinstance(groups.number_format, E8P)
    bits = groups.number_format.bits

    def sweep(now: slice) -> tuple[dict[int, Tensor], Tensor]:
        scale_O = groups.scales(start + now.start)["scales"].to(torch.float32).flatten().expand(target_PO.shape[1])
        codes_KO, error_PO = sweep_lattice_panel(target_PO[now], weight_PO[now], lower_PP[now, now], scale_O, bits)
        return {start + now.start: codes_KO.T}, error_PO

    if groups.single:
        return sweep(slice(0, len(target_PO)))
    return _group_by_group(sweep, target_PO, weight_PO, lower_PP, start, groups)


def scalar_panel(
    target_PO: Tensor, weight_PO: Tensor, lower_PP: Tensor, start: int, groups: Groups, block: int
) -> tuple[dict[int, Tensor], Tensor]:
    """The same for single values of known places: GPTQ's kernels, which walk the columns in reverse order."""
    from lqer.rounding.scalar_panel import sweep_scalars

    def sweep(now: slice) -> tuple[dict[int, Tensor], Tensor]:
        columns = [*range(start + now.stop - 1, start + now.start - 1, -1)]
        upper_PP = -lower_PP[now, now].flip(0, 1)
        upper_PP.diagonal().fill_(1)
        reversed_PO = (x_PO[now].flip(0) for x_PO in (target_PO, weight_PO))
        codes_PO, error_PO = sweep_scalars(next(reversed_PO), upper_PP, groups, columns, next(reversed_PO))
        return {start + now.start: codes_PO.flip(0).T}, error_PO.flip(0)

    if groups.is_fitted(start):
        return sweep(slice(0, len(target_PO)))
    return _group_by_group(sweep, target_PO, weight_PO, lower_PP, start, groups)


def _group_by_group(
    sweep: Callable[[slice], tuple[dict[int, Tensor], Tensor]],
    target_PO: Tensor,
    weight_PO: Tensor,
    lower_PP: Tensor,
    start: int,
    groups: Groups,
) -> tuple[dict[int, Tensor], Tensor]:
    """`sweep` over one group after the other, last to first, each once its scale is fitted."""
    codes: dict[int, Tensor] = {}
    error_PO = torch.empty_like(target_PO)
    for first in reversed(range(0, len(target_PO), groups.width)):
        now = slice(first, min(first + groups.width, len(target_PO)))
        if not groups.is_fitted(start + first):
            _fit_last_group(target_PO, weight_PO, lower_PP, start, groups, start + first)
        group_codes, error_PO[now] = sweep(now)
        codes |= group_codes
        target_PO[:first].addmm_(lower_PP[now, :first].T, error_PO[now])
    return codes, error_PO
