"""A decoder block, or any module, as a function of its parameters: y = f(θ, x), for training or probing it.

The module itself is never changed: parameters are substituted during a call, and the others are detached, so that a
backward pass reaches only the substituted ones.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from lqer.formats import NumberFormat
from lqer.transforms.tracing import hooked


class _StraightThrough(torch.autograd.Function):
    """Rounds in the forward pass, the identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, round_values: Callable[[Tensor], Tensor]) -> Tensor:
        return round_values(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, round_values: Callable[[Tensor], Tensor]) -> Tensor:
    """`round_values(x)`, with the gradient of the identity (straight-through estimator)."""
    return _StraightThrough.apply(x, round_values)


class BlockFunction:
    """`function(parameters, hidden_BTD)`: the block's output with some parameters replaced.

    `parameters` maps names within the block ("mlp.down_proj.weight") to tensors of any float dtype, which are cast to
    the dtype of what they stand in for; matrices that autocast would cast back stay as they are. `args` and `kwargs`
    are the rest of the block's call; of their leaves, those at the positions `per_sequence` are tensors (1, ...) that
    are expanded to the batch. The input of a linear that `activations` names is rounded to that format, per token if
    block_size is "row", and gradients pass straight through that rounding. Hidden states of any float dtype come from
    any device, and are taken to those of the block.
    """

    def __init__(
        self,
        block: nn.Module,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        activations: Mapping[str, NumberFormat] | None = None,
        per_sequence: Collection[int] = (),
    ):
        self.block, self.activations, self.per_sequence = block, dict(activations or {}), per_sequence
        self.args, self.kwargs = args, dict(kwargs or {})
        self._parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}

    def without_rounding(self) -> BlockFunction:
        """The same without rounding the inputs of linears."""
        return BlockFunction(self.block, self.args, self.kwargs, per_sequence=self.per_sequence)

    def __call__(self, parameters: Mapping[str, Tensor], hidden_BTD: Tensor) -> Tensor:
        unknown = parameters.keys() - self._parameters.keys()
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))} is not a parameter of {type(self.block).__name__}")
        first = next(iter(self._parameters.values()))
        hidden_BTD = hidden_BTD.to(first.device, first.dtype, non_blocking=True)
        replaced = {name: _in_place_of(self._parameters[name], tensor) for name, tensor in parameters.items()}
        args, kwargs = self._arguments(len(hidden_BTD))
        with hooked(
            self.block.get_submodule(name).register_forward_pre_hook(_rounded_input(activation))
            for name, activation in self.activations.items()
        ):
            output = functional_call(self.block, {**self._parameters, **replaced}, (hidden_BTD, *args), kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def _arguments(self, sequences: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.per_sequence:
            return self.args, self.kwargs
        leaves, structure = tree_flatten((self.args, self.kwargs))
        for i in self.per_sequence:
            leaves[i] = leaves[i].expand(sequences, *leaves[i].shape[1:])
        return tree_unflatten(leaves, structure)


def _in_place_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    device = parameter.device.type
    if tensor.dim() == 2 and torch.is_autocast_enabled(device) and tensor.dtype == torch.get_autocast_dtype(device):
        return tensor
    return tensor.to(parameter.dtype)


def _rounded_input(activation: NumberFormat) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _, args: (straight_through(args[0], activation.fake_quantize), *args[1:])
