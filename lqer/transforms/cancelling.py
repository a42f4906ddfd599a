"""Queries and keys, found by probing a block: pairs of linears whose scales cancel.

The output of a block does not change when one is doubled and the other halved, because only their products are used.
This holds with rotary embeddings, grouped queries and norms on queries and keys as well.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lqer.transforms.block_function import BlockFunction
from lqer.transforms.tracing import output_stays, trace


@torch.no_grad()
def cancelling_linears(call: BlockFunction, hidden_BTD: Tensor) -> frozenset[str]:
    """The linears of a block, among those called with one tensor, whose scales cancel in pairs.

    hidden_BTD: hidden states of real text. A fused projection is one linear and is not among them.
    """
    seen = trace(call.block, lambda: call({}, hidden_BTD))
    parameters = dict(call.block.named_parameters())

    def scaled(linear: str, factor: float) -> dict[str, Tensor]:
        names = (f"{linear}.weight", f"{linear}.bias")
        return {name: parameters[name].detach() * factor for name in names if name in parameters}

    found: set[str] = set()
    for site in seen.sites():
        for one, other in itertools.combinations(site, 2):
            changed = call(scaled(one, 2) | scaled(other, 0.5), hidden_BTD)
            if output_stays(changed, seen.result, hidden_BTD):
                found |= {one, other}
    return frozenset(found)
