"""Scales by search: of the scales that a number format offers for a group, the one with the least weighted error.

    s = argmin_s  Σ_j w_j (q_s(x_j) - x_j)²        over the format's candidates, the first of equals

w_j is what an error of weight j costs ("search"): H_jj = E[x_j²] where nothing compensates it; under error feedback
1 / U_jj², what is left of H_jj once the later columns have compensated the error (rounding/factor.py has U). The scale
of the format's own fit is among the candidates, so a group's weighted error never exceeds that of the fit. Or w_j = 1
("least-squares"): where a few inputs are very large, weights by their size fit the scales to these alone.

Shapes: G groups of all leading dims, g values of a group, C candidates.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lqer.components import require_choice
from lqer.formats import NumberFormat

Scales = Literal["minmax", "search", "least-squares"]
SCALES: tuple[Scales, ...] = get_args(Scales)
# Values of all candidates that are in memory at once.
MOST_VALUES = 1 << 26


def searched_scales(number_format: NumberFormat, x_Gg: Tensor, importance_Gg: Tensor) -> dict[str, Tensor]:
    """The scales [G] of finite float32 blocks [G, g] with the least weighted error.

    importance_Gg: w, float32, at least 0, of a shape that broadcasts to [G, g]; 0 for padding.
    """
    candidates = number_format.scale_candidates(x_Gg)
    count = len(next(iter(candidates.values())))
    rows = max(MOST_VALUES // max(count * x_Gg[:1].numel(), 1), 1)
    best = []
    for first in range(0, max(len(x_Gg), 1), rows):
        now = slice(first, first + rows)
        scales = {name: part[:, now] for name, part in candidates.items()}
        best.append(_error(number_format, x_Gg[now], importance_Gg, scales).argmin(0))
    index_G = torch.cat(best)
    return {name: part.gather(0, index_G.unsqueeze(0)).squeeze(0) for name, part in candidates.items()}


def _error(number_format: NumberFormat, x_Gg: Tensor, importance_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
    """Σ_j w_j (q(x_j) - x_j)² [C, G] under scales [C, G]."""
    x_CGg = x_Gg.unsqueeze(0)
    values_CGg = number_format.decode(number_format.encode(x_CGg, scales), scales)[..., : x_Gg.shape[-1]]
    return values_CGg.sub_(x_CGg).square_().mul_(importance_Gg).sum(-1)


def importance(scales: Scales, cost_I: Tensor) -> Tensor | None:
    """w, float32 (I,), given what an error of each weight costs; None for the format's own fit."""
    if scales == "minmax":
        return None
    return cost_I.to(torch.float32) if scales == "search" else torch.ones_like(cost_I, dtype=torch.float32)


def require_scales(scales: Any, kind: str) -> None:
    """Raise ValueError unless `scales` is one of the ways to fit a scale."""
    require_choice("scales", scales, SCALES, kind)


def unsupported_search(number_format: NumberFormat, scales: Scales) -> str | None:
    """Why scales of that format cannot be fitted this way; None if they can."""
    if scales == "minmax":
        return None
    if not number_format.has_scale_candidates:
        return f'scales = "{scales}" has no scales to choose from in number format "{number_format.kind}"'
    if number_format.block_size == "tensor":
        return f'scales = "{scales}" needs groups or rows: block_size "tensor" has one scale for all of them'
    return None
