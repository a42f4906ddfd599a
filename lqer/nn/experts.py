"""Runs experts as linears, through transformers' experts registry: a module per expert in the place of 3-D parameters.

Expert e of a layer is the submodule `e` with the linears gate_proj, up_proj and down_proj (made by lqer/nn/stacked.py),
and the tokens that the router sends to it are their inputs:

    y_t = Σ_k w_tk · down_e(gate(gate_e(x_t), up_e(x_t)))        e = the k-th expert of token t

So whatever works on a linear works on an expert's. Everything else of the module, its activation and limits, stays.
Where all linears are packed alike, one submodule takes the place of all experts, and multiplies with them at once.

Shapes: E experts, F intermediate size of an expert, D hidden size, T tokens, K experts of a token, N tokens of an
expert, P = T K pairs of a token and an expert, H halves (gate and up), I in_features, O out_features of its linears.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "lqer_linears"
# The submodule of all experts at once: (x (T, D), index (T, K), weights (T, K), halves (P, H, F) -> (P, F)) -> (T, D).
TOGETHER = "together"
# A module of that registry, whose attributes no class declares.
Experts = Any


class Expert(nn.Module):
    """The linears of one expert; its activation belongs to the module of all experts.

    gate_proj: absent where the experts have no gate.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """The modules of a decoder block that hold split experts, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(getattr(part, "0", None), Expert)}


def expert_of_linear(name: str) -> tuple[str, int] | None:
    """The module of experts and the number of the expert that a linear of that name belongs to; None for others."""
    module, expert, _ = (*name.rsplit(".", 2), "", "")[:3]
    return (module, int(expert)) if expert.isdigit() else None


def count(experts: Experts) -> int:
    """How many experts a module holds."""
    return sum(isinstance(child, Expert) for child in experts.children())


def choices(experts: Experts) -> int:
    """How many a router chooses among: those, and others without weights (lqer/nn/unregistered.py)."""
    return getattr(experts, "choices", count(experts))


def run_expert(experts: Experts, index: int, x_ND: Tensor) -> Tensor:
    """The output (N, D) of one expert, not weighted by the router."""
    expert = experts.get_submodule(str(index))
    y_ND = expert.down_proj(expert_inputs(experts, index, x_ND, ["down_proj"])["down_proj"])
    return experts.post_expert_norm(y_ND) if has_norm(experts) else y_ND


def expert_inputs(experts: Experts, index: int, x_ND: Tensor, linears: Collection[str]) -> dict[str, Tensor]:
    """The inputs of these linears of an expert, by their names within it: x, or of down what is made of it."""
    expert, names = experts.get_submodule(str(index)), up_names(experts)
    inputs = {name: x_ND for name in names if name in linears}
    if "down_proj" in linears:
        inputs["down_proj"] = activate(experts, [expert.get_submodule(name)(x_ND) for name in names])
    return inputs


def up_names(experts: Experts) -> tuple[str, ...]:
    """The linears of an expert before its activation."""
    return ("gate_proj", "up_proj") if experts.has_gate else ("up_proj",)


def has_norm(experts: Experts) -> bool:
    """Whether an expert ends with a norm; older versions of transformers know of none."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def activate(experts: Experts, halves: Sequence[Tensor]) -> Tensor:
    """The input of down (N, F) from the outputs of `up_names`, each (N, F)."""
    return experts._apply_gate(_join(experts, *halves)) if experts.has_gate else experts.act_fn(halves[0])


def put_together(experts: Experts, together: nn.Module) -> None:
    """Put one module in the place of all experts: it is called as TOGETHER says."""
    for index in range(count(experts)):
        del experts._modules[str(index)]
    experts.add_module(TOGETHER, together)


def run_experts(experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The contract of transformers' experts functions: the output (T, D).

    hidden_states: (T, D). top_k_index: int64 (T, K); what lies outside the experts stands for none. top_k_weights:
    (T, K).
    """
    if (together := experts._modules.get(TOGETHER)) is not None:
        return together(hidden_states, top_k_index, top_k_weights, partial(_activate_pairs, experts))
    y_TD = torch.zeros_like(hidden_states)
    for index, tokens_N, places_N in routes(top_k_index, count(experts)):
        y_ND = run_expert(experts, index, hidden_states[tokens_N]) * top_k_weights[tokens_N, places_N, None]
        # No token comes twice, so the sum does not depend on the order in which a GPU adds.
        y_TD.index_add_(0, tokens_N, y_ND.to(y_TD.dtype))
    return y_TD


def routes(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that is sent tokens, ascending, with those tokens (N,), ascending, and their places among the K."""
    chosen = top_k_index.flatten().clamp(max=experts)
    order = chosen.argsort(stable=True)
    start = 0
    for index, rows in enumerate(torch.bincount(chosen, minlength=experts)[:experts].tolist()):
        if rows:
            pairs_N = order[start : start + rows]
            yield index, pairs_N // top_k_index.shape[-1], pairs_N % top_k_index.shape[-1]
        start += rows


def _activate_pairs(experts: Experts, halves_PHF: Tensor) -> Tensor:
    return activate(experts, halves_PHF.unbind(1))


def _join(experts: Experts, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Outputs of gate and up, (N, 2F) as the model's own gate takes them."""
    if experts.is_concatenated:
        return torch.cat([gate_NF, up_NF], dim=-1)
    return torch.stack([gate_NF, up_NF], dim=-1).flatten(-2)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
