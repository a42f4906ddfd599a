"""Experts that transformers does not run through its registry, given the contract of those that it does.

They are known by their parameters, `gate_up_proj` (E', 2F, D) and `down_proj` (E, D, F) or both transposed and nothing
else, and by what their forward takes:

    (x (T, D), index (T, K), weights (T, K))    as in the registry (LongCat, Step 3.7)
    (x (E T, D),)                               the inputs of the first expert, then of the second, and so on, times the
                                                router's weights; zeros for tokens that are sent elsewhere (Llama 4)

Where a router chooses among E' > E, the last ones hold no weights and pass their tokens on: y = x (LongCat).

What stands between gate and down cannot be seen from outside: `lqer/models/probe.py` compares each such class with its
own code before any work.

Shapes: E experts with weights, E' those that a router chooses among, F intermediate size, D hidden size, T tokens, K
experts of a token, P pairs of a token and an expert.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from lqer.nn.experts import Experts, run_experts

PARAMETERS = {"gate_up_proj", "down_proj"}


def registered_class(experts: nn.Module) -> Any:
    """The class that runs a module's experts once they are split, with the attributes of those of the registry.

    None where it is no such module. See `adopt`.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    if shapes.keys() != PARAMETERS or {len(shape) for shape in shapes.values()} != {3}:
        return None
    (choices, *up), (held, rows, columns) = shapes["gate_up_proj"], shapes["down_proj"]
    own: Any = type(experts)
    form, is_transposed = _form(own), up == [columns, 2 * rows]
    if form is None or choices < held or not (is_transposed or up == [2 * columns, rows]):
        return None
    return _registered(form, own, is_transposed)


def adopt(experts: Experts, registered: Any) -> None:
    """Change the class of a module whose weights are still stacked, in place."""
    experts.held, experts.choices = len(experts.down_proj), len(experts.gate_up_proj)
    experts.__class__ = registered


def takes_rows(experts: nn.Module) -> bool:
    """Whether a module takes the inputs of all its experts one after the other."""
    return _form(type(experts)) is _Rows


class _Routed(nn.Module):
    """Experts with the attributes of modules of the registry."""

    is_concatenated, has_bias, has_gate = True, False, True
    held: int
    choices: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y_TD = run_experts(self, hidden_states, top_k_index, top_k_weights)
        if self.choices > self.held:
            passed_T1 = top_k_weights.where(top_k_index >= self.held, 0).sum(1, keepdim=True)
            y_TD = y_TD + (hidden_states * passed_T1).to(y_TD.dtype)
        return y_TD


class _Rows(_Routed):
    """Called with rows of all experts, and forwards, where hooks see it, those that are sent to one."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x_ETD = hidden_states.view(self.held, -1, hidden_states.shape[-1])
        # Sorted by token, so that rows stay in the order of the text.
        tokens_P, experts_P = x_ETD.any(-1).T.nonzero(as_tuple=True)
        x_PD = x_ETD[experts_P, tokens_P]
        y_ETD = torch.zeros_like(x_ETD)
        y_ETD[experts_P, tokens_P] = super().__call__(x_PD, experts_P[:, None], x_PD.new_ones(len(x_PD), 1))
        return y_ETD.view_as(hidden_states)


def _form(own: Any) -> Any:
    """Which of the two a class takes; None where it is neither."""
    return {3: _Routed, 1: _Rows}.get(len(inspect.signature(own.forward).parameters) - 1)


@cache
def _registered(form: Any, own: Any, is_transposed: bool) -> Any:
    gate = getattr(own, "_apply_gate", moe._default_apply_gate)
    return type(own.__name__, (form, own), {"is_transposed": is_transposed, "_apply_gate": gate})
