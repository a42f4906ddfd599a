"""Experts as linears: a layer's 3-D parameters become one module per expert, through transformers' experts registry.

transformers holds the experts of a layer in `gate_up_proj` (E, 2F, D), or `up_proj` where there is no gate, and
`down_proj` (E, D, F); some transpose them, interleave gate and up, or have biases. Here expert e becomes the submodule
`e` with the linears gate_proj, up_proj and down_proj, and the tokens that the router sends to it are their inputs:

    y_t = Σ_k w_tk · down_e(gate(gate_e(x_t), up_e(x_t)))        e = the k-th expert of token t

So whatever works on a linear works on an expert's. Everything else of the module, its activation and limits, stays.

Shapes: E experts, F intermediate size of an expert, D hidden size, T tokens, K experts of a token, N tokens of an
expert, I in_features, O out_features of its linears.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "lqer_linears"
# Attributes that transformers gives every module of its experts registry.
REGISTERED = ("is_concatenated", "is_transposed", "has_bias", "has_gate")
# A module of that registry, whose attributes no class declares.
Experts = Any


class Expert(nn.Module):
    """The linears of one expert; its activation belongs to the module of all experts.

    gate_proj: absent where the experts have no gate.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


def split_experts(model: nn.Module) -> None:
    """Replace the stacked weights of all registered experts of a model by linears, in place, layer by layer."""
    modules: list[Experts] = [module for module in model.modules() if all(hasattr(module, key) for key in REGISTERED)]
    for experts in modules:
        if isinstance(experts.down_proj, nn.Parameter):
            _split(experts)
            # Of this configuration alone: the setter would reach those of other towers.
            experts.config._experts_implementation_internal = IMPLEMENTATION


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """The modules of a decoder block that hold split experts, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(getattr(part, "0", None), Expert)}


def count(experts: Experts) -> int:
    """How many experts a module holds."""
    return sum(isinstance(child, Expert) for child in experts.children())


def run_expert(experts: Experts, index: int, x_ND: Tensor) -> Tensor:
    """The output (N, D) of one expert, not weighted by the router."""
    expert = experts.get_submodule(str(index))
    if experts.has_gate:
        hidden_NF = experts._apply_gate(_join(experts, expert.gate_proj(x_ND), expert.up_proj(x_ND)))
    else:
        hidden_NF = experts.act_fn(expert.up_proj(x_ND))
    y_ND = expert.down_proj(hidden_NF)
    return experts.post_expert_norm(y_ND) if experts.has_post_expert_norm else y_ND


def run_experts(experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The contract of transformers' experts functions: the output (T, D).

    hidden_states: (T, D). top_k_index: int64 (T, K); what lies outside the experts stands for none. top_k_weights:
    (T, K).
    """
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


def _split(experts: Experts) -> None:
    up = _taken(experts, "gate_up_proj" if experts.has_gate else "up_proj")
    linears = (
        {"gate_proj": _part(experts, up, 0), "up_proj": _part(experts, up, 1)} if experts.has_gate else {"up_proj": up}
    )
    linears["down_proj"] = _taken(experts, "down_proj")
    for index in range(len(linears["down_proj"]["weight"])):
        expert = Expert()
        for name, stacked in linears.items():
            expert.add_module(name, _linear(**{leaf: tensor[index] for leaf, tensor in stacked.items()}))
        experts.add_module(str(index), expert)


def _taken(experts: Experts, name: str) -> dict[str, Tensor]:
    """A stacked weight (E, O, I), and bias (E, O) if there is one, which the module has no longer."""
    weight = experts._parameters.pop(name).detach()
    stacked = {"weight": weight.transpose(1, 2) if experts.is_transposed else weight}
    if experts.has_bias:
        stacked["bias"] = experts._parameters.pop(f"{name}_bias").detach()
    return stacked


def _part(experts: Experts, fused: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The gate's (0) or the up projection's (1) of stacked weights (E, 2F, D) and biases (E, 2F)."""
    if experts.is_concatenated:
        return {leaf: tensor.chunk(2, dim=1)[index] for leaf, tensor in fused.items()}
    return {leaf: tensor[:, index::2] for leaf, tensor in fused.items()}


def _join(experts: Experts, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Outputs of gate and up, (N, 2F) as the model's own gate takes them."""
    if experts.is_concatenated:
        return torch.cat([gate_NF, up_NF], dim=-1)
    return torch.stack([gate_NF, up_NF], dim=-1).flatten(-2)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear with copies of these values: views would keep the whole stack in memory."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
