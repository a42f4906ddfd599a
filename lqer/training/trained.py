"""Stored tensors that are trained, and how a model computes with them.

A trained tensor is either its own parameter, or start + unit · δ with δ from 0: a learning rate is then relative to the
size of the tensor (unit: its root mean square) or of every element (unit: the start itself). While it is trained the
model uses the float32 value; for validation it uses the value as it would be stored.

They are parametrizations of module tensors (torch.nn.utils.parametrize): evaluated where the module is used, so that a
block under gradient checkpointing holds a decoded weight only while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lqer.formats import QuantizedTensor


class Trained(nn.Module):
    """A trained tensor.

    tensor: where it starts, any float dtype. storage: the dtype it is stored in. kind: what its learning rate goes by.
    unit: what δ is multiplied by, broadcast to the tensor; without one the tensor itself is the parameter.
    """

    def __init__(self, tensor: Tensor, storage: torch.dtype, kind: str, unit: Tensor | None = None):
        super().__init__()
        start = tensor.detach().to(torch.float32).clone()
        self.storage, self.kind = storage, kind
        self.start: Tensor | None = None if unit is None else start
        self.unit = unit
        self.parameter = nn.Parameter(start if unit is None else torch.zeros_like(start))

    @classmethod
    def relative(cls, tensor: Tensor, kind: str) -> Trained:
        """A tensor stored in its own dtype, with steps relative to its root mean square (to 1 if it is zero)."""
        size = tensor.detach().to(torch.float32).square().mean().sqrt()
        return cls(tensor, tensor.dtype, kind, torch.where(size > 0, size, 1.0))

    @classmethod
    def elementwise(cls, tensor: Tensor, kind: str) -> Trained:
        """A tensor stored in its own dtype, with steps relative to every element: one that is zero stays zero."""
        return cls(tensor, tensor.dtype, kind, tensor.detach().to(torch.float32))

    def value(self, parameter: Tensor) -> Tensor:
        """The float32 tensor that belongs to a value of the parameter."""
        return parameter if self.start is None or self.unit is None else self.start + self.unit * parameter

    def stored(self, parameter: Tensor) -> Tensor:
        """The tensor of `value` in the dtype it is stored in."""
        return self.value(parameter.detach()).to(self.storage)

    def forward(self) -> Tensor:
        """In training mode the float32 value, with gradients; else the value as it is stored."""
        return self.value(self.parameter) if self.training else self.stored(self.parameter)


class Replaced(nn.Module):
    """A module tensor that is a trained one, in the module's dtype; `rest` of it, along `axis`, is not trained."""

    def __init__(self, trained: Trained, dtype: torch.dtype, rest: Tensor | None = None, axis: int = 0):
        super().__init__()
        self.trained, self.dtype, self.rest, self.axis = trained, dtype, rest, axis

    def forward(self, original: Tensor) -> Tensor:
        """The tensor; what it replaces is not read."""
        value = self.trained().to(self.dtype)
        return value if self.rest is None else torch.cat([value, self.rest], dim=self.axis)


class Decoded(nn.Module):
    """A module tensor decoded from codes that stay and metadata that are trained, by the name of the part."""

    def __init__(self, quantized: QuantizedTensor, trained: Mapping[str, Trained], dtype: torch.dtype):
        super().__init__()
        self.quantized, self.dtype = quantized, dtype
        self.trained = nn.ModuleDict(trained)

    def forward(self, original: Tensor) -> Tensor:
        """The tensor; what it replaces is not read."""
        parts = self.quantized.parts | {name: trained() for name, trained in self.trained.items()}
        return replace(self.quantized, parts=parts).dequantize(self.dtype)


def compute_with(module: nn.Module, name: str, parametrization: Replaced | Decoded) -> None:
    """Let a module's tensor `name` be computed by `parametrization`, in place. A buffer's own values are let go."""
    if name in module._buffers:
        setattr(module, name, getattr(module, name).new_empty(0))
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
