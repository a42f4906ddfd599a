"""Experts as linears: a layer's 3-D parameters become one module per expert, through transformers' experts registry.

transformers holds the experts of a layer in `gate_up_proj` (E, 2F, D), or `up_proj` where there is no gate, and
`down_proj` (E, D, F); some transpose them, interleave gate and up, or have biases. Here expert e becomes the submodule
`e` with the linears gate_proj, up_proj and down_proj, and the tokens that the router sends to it are their inputs:

    y_t = Σ_k w_tk · down_e(gate(gate_e(x_t), up_e(x_t)))        e = the k-th expert of token t

So whatever works on a linear works on an expert's. Everything else of the module, its activation and limits, stays.
Where all linears are packed alike, one submodule takes the place of all experts, and multiplies with them at once.

Shapes: E experts, F intermediate size of an expert, D hidden size, T tokens, K experts of a token, N tokens of an
expert, P = T K pairs of a token and an expert, H halves (gate and up), I in_features, O out_features of its linears.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "lqer_linears"
# The submodule of all experts at once: (x (T, D), index (T, K), weights (T, K), halves (P, H, F) -> (P, F)) -> (T, D).
TOGETHER = "together"
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
    for _, experts in list(_stacked(model)):
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
    y_ND = expert.down_proj(activate(experts, [expert.get_submodule(name)(x_ND) for name in up_names(experts)]))
    return experts.post_expert_norm(y_ND) if has_norm(experts) else y_ND


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


@dataclass(frozen=True)
class Piece:
    """Where the weight or bias of one expert's linear is in a stacked parameter. half: 0 the gate's, 1 up's, or all."""

    expert: int
    half: int | None
    is_transposed: bool
    is_concatenated: bool

    def of(self, stacked: Tensor) -> Tensor:
        """A view of the weight (O, I) or bias (O,)."""
        part = stacked[self.expert].T if self.is_transposed else stacked[self.expert]
        if self.half is None:
            return part
        return part.chunk(2)[self.half] if self.is_concatenated else part[self.half :: 2]


def pieces(experts: Experts, parameter: str) -> dict[str, Piece]:
    """The pieces of a stacked parameter by their names in the module once it is split, as "17.gate_proj.weight"."""
    stacked = getattr(experts, parameter)
    linear, leaf = parameter.removesuffix("_bias"), "bias" if parameter.endswith("_bias") else "weight"
    halves = {"gate_proj": 0, "up_proj": 1} if linear == "gate_up_proj" else {linear: None}
    is_transposed = experts.is_transposed and leaf == "weight"
    return {
        f"{index}.{name}.{leaf}": Piece(index, half, is_transposed, experts.is_concatenated)
        for index in range(len(stacked))
        for name, half in halves.items()
    }


def stacks(model: nn.Module) -> dict[str, dict[str, Piece]]:
    """The pieces of every stacked parameter of a model that is not split yet, both by full names."""
    return {
        f"{name}.{parameter}": {f"{name}.{key}": piece for key, piece in pieces(experts, parameter).items()}
        for name, experts in _stacked(model)
        for parameter in _parameters(experts)
    }


def stacked(
    tensors: Mapping[str, Tensor], stacks: Mapping[str, Mapping[str, Piece]], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """`tensors` with the pieces among them put into the parameters that they are of: `_split` undone.

    stacks: see `stacks`. shapes: of the stacked parameters, by the same names. Raises KeyError for a missing piece.
    """
    found = dict(tensors)
    for name, places in stacks.items():
        if places.keys().isdisjoint(found):
            continue
        parts = {key: found.pop(key) for key in places}
        dtype = reduce(torch.promote_types, {part.dtype for part in parts.values()})
        found[name] = torch.empty(shapes[name], dtype=dtype)
        for key, part in parts.items():
            places[key].of(found[name]).copy_(part)
    return found


def _stacked(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The modules of the registry whose experts are stacked, by name."""
    experts: Experts
    for name, experts in model.named_modules():
        if all(hasattr(experts, key) for key in REGISTERED) and isinstance(experts.down_proj, nn.Parameter):
            yield name, experts


def _parameters(experts: Experts) -> list[str]:
    linears = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
    return [*linears, *(f"{linear}_bias" for linear in linears if experts.has_bias)]


def _split(experts: Experts) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for parameter in _parameters(experts):
        places, stacked = pieces(experts, parameter), experts._parameters.pop(parameter).detach()
        for key, piece in places.items():
            linear, _, leaf = key.rpartition(".")
            # A copy: a view would keep the whole stack in memory.
            found.setdefault(linear, {})[leaf] = piece.of(stacked).clone(memory_format=torch.contiguous_format)
    for path, tensors in found.items():
        index, _, name = path.partition(".")
        if index not in experts._modules:
            experts.add_module(index, Expert())
        experts.get_submodule(index).add_module(name, _linear(**tensors))


def _activate_pairs(experts: Experts, halves_PHF: Tensor) -> Tensor:
    return activate(experts, halves_PHF.unbind(1))


def _join(experts: Experts, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Outputs of gate and up, (N, 2F) as the model's own gate takes them."""
    if experts.is_concatenated:
        return torch.cat([gate_NF, up_NF], dim=-1)
    return torch.stack([gate_NF, up_NF], dim=-1).flatten(-2)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
