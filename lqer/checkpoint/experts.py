"""Experts of a loaded block that the kernels multiply together: one module for all of a layer's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import moe

from lqer.errors import ModelError
from lqer.nn.experts import Experts, count, experts_of, has_norm, put_together, up_names

if TYPE_CHECKING:
    from lqer.kernels import PackedExperts, PackedLinear

log = logging.getLogger(__name__)

# What the kernels call an activation, by transformers' name for it.
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def group_experts(module: nn.Module) -> None:
    """Put experts whose linears are packed alike into one module each, in place; leave others as they are.

    Raises ModelError if their kernels compute something else than plain torch.
    """
    from lqer.kernels import GroupedExperts, compare_experts_once

    for name, experts in experts_of(module).items():
        try:
            up, down = _packed(experts)
        except ValueError as reason:
            log.info("%s: experts run one after another: %s", name, reason)
            continue
        grouped = GroupedExperts(up, down, gate_of(experts))
        try:
            compare_experts_once(grouped)
        except ArithmeticError as error:
            raise ModelError(f'{name}: {error}; use backend = "emulate"') from None
        put_together(experts, grouped)


def gate_of(experts: Experts) -> str:
    """What the kernels call the activation of gate, where hidden = act(gate) * up; else ""."""
    if not experts.has_gate or type(experts)._apply_gate is not moe._default_apply_gate:
        return ""
    known = (ours for theirs, ours in ACTIVATIONS.items() if type(experts.act_fn) is type(ACT2FN[theirs]))
    return next(known, "")


def _packed(experts: Experts) -> tuple[PackedExperts, PackedExperts]:
    """Linears before and after the activation, stacked. Raises ValueError, with the reason, if they cannot be."""
    from lqer.kernels import PackedExperts, TritonLinear

    if has_norm(experts):
        raise ValueError("an expert ends with a norm")

    def linear(index: int, name: str) -> PackedLinear:
        found = experts.get_submodule(f"{index}.{name}")
        if not isinstance(found, TritonLinear):
            raise ValueError(f"{index}.{name} is not a linear on packed codes")
        return found.packed

    indices = range(count(experts))
    up = PackedExperts.stack([[linear(index, name) for name in up_names(experts)] for index in indices])
    return up, PackedExperts.stack([[linear(index, "down_proj")] for index in indices])
