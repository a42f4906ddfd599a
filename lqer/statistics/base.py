"""What a statistic is: a tensor that is gathered from the inputs of linear layers over the calibration text.

A statistic is a frozen dataclass deriving from `Statistic`. Linears that are called with the same tensor form one input
site and share its statistics; each site gets an accumulator of its own. The result is stored under the statistic's
kind, and roundings and methods that name it find it under that kind in the mapping they are given.

Shapes: I in_features, N tokens of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lqer.components import Component
from lqer.statistics.gang import Gang


class Accumulator(Protocol):
    """Sums up one statistic of one input site, batch by batch."""

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        """Take in one batch, with float32 products in full precision (no TF32).

        x_NI: inputs of the site, in the model's dtype. original_NI: the inputs of the same tokens at the same site in
        the original model; None unless the statistic asks for them. sampled_N: int64 indices of the tokens whose
        inputs a sample keeps. weights_N: float32, at least 0, what a token counts in a mean, relative to the others;
        given only where tokens are weighted, to a statistic that says it `weights_tokens`.
        """

    def join(self, gang: Gang) -> None:
        """Take in what the accumulators of the other ranks have, each of batches of its own, in their order.

        All ranks call it at once, and then have the same.
        """

    def result(self) -> Tensor:
        """The statistic over all batches so far."""


class Allocator(Protocol):
    """Where accumulators get large tensors: in memory, or on disk beyond its budget (`store.offload.Offload`)."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor: ...


class InputRotation(Protocol):
    """V of rotated inputs x' = V x, V orthonormal (`transforms.Rotation`)."""

    def hessian(self, hessian_II: Tensor) -> Tensor:
        """V H Vᵀ of a symmetric H."""

    def input(self, x_TI: Tensor) -> Tensor:
        """V x for every row x."""


class Statistic(Component, ABC, family="statistic"):
    """Settings of one statistic."""

    # Whether it is gathered from pairs of inputs: those in the quantized model and those in the original one.
    needs_original: ClassVar[bool] = False
    # Whether it is a mean in which tokens can have weights.
    weights_tokens: ClassVar[bool] = False

    @abstractmethod
    def accumulator(self, in_features: int, device: torch.device, offload: Allocator) -> Accumulator:
        """An accumulator for one input site whose inputs are on `device`."""

    @abstractmethod
    def nbytes(self, in_features: int) -> int:
        """Bytes of one site's accumulator, leaving out sampled inputs."""

    def result_nbytes(self, in_features: int) -> int:
        """Bytes of one site's result, leaving out sampled inputs."""
        return self.nbytes(in_features)

    @property
    def rotates_from(self) -> Statistic | None:
        """The statistic of x from which this one of V x follows; None where none determines it."""
        return None

    def rotated(self, value: Tensor, rotation: InputRotation) -> Tensor:
        """The statistic of V x, given the value of `rotates_from` for x."""
        raise NotImplementedError(f"{self.kind} of rotated inputs does not follow from statistics of the inputs")
