"""Experts as transformers holds them, the weights of a layer in 3-D parameters, and the linears that they become.

They are `gate_up_proj` (E, 2F, D), or `up_proj` where there is no gate, and `down_proj` (E, D, F); some are transposed,
interleave gate and up, or have biases. Those of transformers' experts registry say which; others are recognized by
their shapes (lqer/nn/unregistered.py).

Shapes: E experts, F intermediate size of an expert, D hidden size, I in_features, O out_features of its linears.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lqer.nn.experts import IMPLEMENTATION, Expert, Experts
from lqer.nn.grouped import grouped
from lqer.nn.unregistered import adopt, registered_class

# Attributes that transformers gives every module of its experts registry.
REGISTERED = ("is_concatenated", "is_transposed", "has_bias", "has_gate")


def split_experts(model: nn.Module) -> None:
    """Replace the stacked weights of all experts of a model by linears, in place, layer by layer."""
    for _, experts in list(_stacked(model)):
        if _is_registered(experts):
            # Set on this configuration alone: the setter would also change those of other towers.
            experts.config._experts_implementation_internal = IMPLEMENTATION
        elif (registered := registered_class(experts)) is not None:
            adopt(experts, registered)
        _split(experts)


def unregistered(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The modules outside of transformers' registry whose experts are stacked, by name."""
    return ((name, experts) for name, experts in _stacked(model) if not _is_registered(experts))


@dataclass(frozen=True)
class Piece:
    """Where the weight or bias of one expert's linear is in a stacked parameter. half: 0 the gate's, 1 up's, or all.

    groups: 0 for a stack; else the parameter is a matrix that holds this many linears below each other, and `expert` is
    the number of one of them.
    """

    expert: int
    half: int | None
    is_transposed: bool
    is_concatenated: bool
    groups: int = 0

    def of(self, stacked: Tensor) -> Tensor:
        """A view of the weight (O, I) or bias (O,)."""
        if self.groups:
            return stacked.chunk(self.groups)[self.expert]
        part = stacked[self.expert].T if self.is_transposed else stacked[self.expert]
        if self.half is None:
            return part
        return part.chunk(2)[self.half] if self.is_concatenated else part[self.half :: 2]


def pieces(experts: Experts, parameter: str) -> dict[str, Piece]:
    """The pieces of a stacked parameter by their names in the module once it is split, as "17.gate_proj.weight"."""
    layout = _layout(experts)
    linear, leaf = parameter.removesuffix("_bias"), "bias" if parameter.endswith("_bias") else "weight"
    halves = {"gate_proj": 0, "up_proj": 1} if linear == "gate_up_proj" else {linear: None}
    is_transposed = layout.is_transposed and leaf == "weight"
    return {
        f"{index}.{name}.{leaf}": Piece(index, half, is_transposed, layout.is_concatenated)
        # gate_up_proj may have more entries, for experts that pass their tokens on; nothing reads those.
        for index in range(len(experts.down_proj))
        for name, half in halves.items()
    }


def stacks(model: nn.Module) -> dict[str, dict[str, Piece]]:
    """The pieces of every stacked parameter of a model that is not split yet, both by full names.

    Those of projections of groups are among them (lqer/nn/grouped.py).
    """
    of_groups = {
        f"{name}.weight": {f"{name}.{i}.weight": Piece(i, None, False, True, groups) for i in range(groups)}
        for name, _, groups in grouped(model)
    }
    return of_groups | {
        f"{name}.{parameter}": {f"{name}.{key}": piece for key, piece in pieces(experts, parameter).items()}
        for name, experts in _stacked(model)
        for parameter in _parameters(experts)
    }


def stacked(
    tensors: Mapping[str, Tensor], stacks: Mapping[str, Mapping[str, Piece]], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """`tensors` with the pieces among them put into the parameters that they are of: `_split` undone.

    Where a parameter has more than its pieces, it is zero. stacks: see `stacks`. shapes: of the stacked parameters, by
    the same names. Raises KeyError for a missing piece.
    """
    found = dict(tensors)
    for name, places in stacks.items():
        if places.keys().isdisjoint(found):
            continue
        parts = {key: found.pop(key) for key in places}
        dtype = reduce(torch.promote_types, {part.dtype for part in parts.values()})
        found[name] = torch.zeros(shapes[name], dtype=dtype)
        for key, part in parts.items():
            places[key].of(found[name]).copy_(part)
    return found


def _stacked(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The modules whose experts are stacked, by name."""
    for name, module in model.named_modules():
        is_stacked = module._parameters.get("down_proj") is not None
        if is_stacked and (_is_registered(module) or registered_class(module) is not None):
            yield name, module


def _is_registered(module: nn.Module) -> bool:
    return all(hasattr(module, key) for key in REGISTERED)


def _layout(experts: Experts) -> Any:
    """What has the attributes REGISTERED of a module."""
    return experts if _is_registered(experts) else registered_class(experts)


def _parameters(experts: Experts) -> list[str]:
    layout = _layout(experts)
    linears = ["gate_up_proj" if layout.has_gate else "up_proj", "down_proj"]
    return [*linears, *(f"{linear}_bias" for linear in linears if layout.has_bias)]


def _split(experts: Experts) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    # Before the first parameter is gone.
    of_parameters = {parameter: pieces(experts, parameter) for parameter in _parameters(experts)}
    for parameter, places in of_parameters.items():
        stacked = experts._parameters.pop(parameter).detach()
        for key, piece in places.items():
            linear, _, leaf = key.rpartition(".")
            # A copy: a view would keep the whole stack in memory.
            found.setdefault(linear, {})[leaf] = piece.of(stacked).clone(memory_format=torch.contiguous_format)
    for path, tensors in found.items():
        index, _, name = path.partition(".")
        if index not in experts._modules:
            experts.add_module(index, Expert())
        experts.get_submodule(index).add_module(name, _linear(**tensors))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
