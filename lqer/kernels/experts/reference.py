"""Experts on packed tensors in plain torch: used without a GPU, and the reference that kernels are compared with.

Shapes: T tokens, K experts of a token, P = T K pairs, N pairs of an expert, H halves, I in_features, O out_features,
F outputs of up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lqer.kernels.experts.packed import PackedExperts
from lqer.kernels.reference import reference_linear
from lqer.kernels.spec import Spec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def reference_up(
    x_TI: Tensor, index_TK: Tensor, up: PackedExperts, down: Spec, gate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `run_up`, but that hidden [P, F] is not rounded; pairs are not sorted."""
    pairs = index_TK.numel()
    y_PHF = x_TI.new_full((pairs, up.halves, up.spec.layout.rows), torch.nan)
    for expert, pairs_N in _by_expert(index_TK, up.experts):
        x_NI = x_TI[pairs_N // index_TK.shape[1]]
        y_PHF[pairs_N] = torch.stack([reference_linear(x_NI, up.linear(expert, h)) for h in range(up.halves)], dim=1)
    y = y_PHF
    if gate:
        y = x_TI.new_zeros(up.outputs(pairs, down, gate))
        y[:, : up.spec.layout.rows] = ACTIVATIONS[gate](y_PHF[:, 0]) * y_PHF[:, 1]
    nothing = index_TK.new_zeros(pairs, dtype=torch.int32)
    return y, nothing, nothing.expand(3, -1).clone()


def reference_down(
    hidden: Tensor,
    order_P: Tensor,
    tiles_3P: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    down: PackedExperts,
    up: Spec,
    is_ready: bool,
) -> Tensor:
    """As `run_down`, of what `reference_up` makes."""
    layout = down.spec.layout
    pairs_PO = hidden.new_zeros(index_TK.numel(), layout.rows)
    for expert, pairs_N in _by_expert(index_TK, down.experts):
        pairs_PO[pairs_N] = reference_linear(hidden[pairs_N, : layout.columns], down.linear(expert, 0))
    y_TKO = pairs_PO.float().unflatten(0, index_TK.shape) * weights_TK.float()[..., None]
    return y_TKO.sum(1).to(hidden.dtype)


def _by_expert(index_TK: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Experts that are sent tokens, with their pairs."""
    for expert in index_TK.unique().tolist():
        if 0 <= expert < experts:
            yield expert, (index_TK.flatten() == expert).nonzero().squeeze(1)
