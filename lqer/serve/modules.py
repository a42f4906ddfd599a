"""The module of what one rank holds of a linear.

Split by inputs, W x and x A are sums over ranks. The engine sums the outputs; so without rounded inputs every rank adds
its own (x A) B. With them Q(x A) needs the sum of x A first, which is as small as the rank, and Q(Q(x A) B) is added on
one rank.

Shapes: T tokens, I in_features of this rank, O out_features, R rank of the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from lqer.checkpoint.backend import Backend
from lqer.checkpoint.linear import LinearTensors
from lqer.formats import NumberFormat
from lqer.serve.shards import join_outputs

Reduce = Callable[[Tensor], Tensor]


class SummedBranch(nn.Module):
    """W_q x_q of one rank and, on the rank that adds it, Q(Q(sum of x_q A) B).

    inner: the linear without factors, which rounds its input itself. a_IR: this rank's rows; b_RO: the whole.
    reduce: the sum of a tensor over all ranks, on every rank.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self, inner: nn.Module, a_IR: Tensor, b_RO: Tensor, activation: NumberFormat, adds: bool, reduce: Reduce
    ):
        super().__init__()
        self.inner, self.activation, self.adds, self.reduce = inner, activation, adds, reduce
        self.register_buffer("a", a_IR)
        self.register_buffer("b", b_RO)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) in the layer's dtype -> (..., O)."""
        round_ = self.activation.fake_quantize
        y = self.inner(x)
        projection = self.reduce(round_(x) @ self.a)
        return y + round_(round_(projection) @ self.b) if self.adds else y


class SideBySide(nn.Module):
    """Linears of one input, their outputs one after another."""

    def __init__(self, linears: Sequence[nn.Module]):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) -> (..., sum of the linears' O)."""
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


def outputs_module(linears: Sequence[LinearTensors], backend: Backend, dtype: torch.dtype) -> nn.Module:
    """The module of one rank's outputs of one or several linears of the same input, without their biases.

    Several are one linear where that computes the same. Raises ModelError where the backend cannot run them.
    """
    plain = [replace(linear, bias_O=None) for linear in linears]
    if len(plain) > 1:
        with suppress(ValueError):  # they run one after another
            plain = [join_outputs(plain)]
    modules = [linear.module(backend, dtype) for linear in plain]
    return modules[0] if len(modules) == 1 else SideBySide(modules)


def inputs_module(linear: LinearTensors, backend: Backend, dtype: torch.dtype, rank: int, reduce: Reduce) -> nn.Module:
    """The module of one rank's inputs of a linear that is split by inputs, without its bias."""
    plain = replace(linear, bias_O=None)
    a, b = plain.merged_factors(dtype)
    if a is None or b is None or plain.activation is None:
        return plain.module(backend, dtype)
    inner = replace(plain, factors={}).module(backend, dtype)
    return SummedBranch(inner, a, b, plain.activation, rank == 0, reduce)
