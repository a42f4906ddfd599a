"""What a transform is: a rotation, a scale or a clipped range that is applied to a weight before rounding.

A transform is functions on tensors in a file of its own, and a frozen dataclass deriving from `Transform` that passes
its settings to them. The dataclass is what a configuration's `quantize.transforms` names: `"hadamard"`, or
`{ kind = "hadamard" }` with settings next to the kind. It works at one of three levels:

    model     the whole model, before anything else; its function does not change
    block     the linears and norms of one decoder block together, given the inputs of the block
    linear    one linear: the rotated weight is rounded; the layer rotates its inputs, and its outputs back

In a list of transforms the wider level comes first, in the order of application.

Shapes: I in_features, O out_features, T rows of activations.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lqer.components import Component
from lqer.formats import NumberFormat
from lqer.statistics import Statistic

Level = Literal["model", "block", "linear"]
LEVELS: tuple[Level, ...] = ("model", "block", "linear")


@dataclass(frozen=True)
class Scheme:
    """The formats of a linear's weight and input (None: the model's dtype), and the statistics of its inputs.

    statistics: those that its method and its rounding read.
    """

    weight: NumberFormat
    activation: NumberFormat | None
    statistics: frozenset[Statistic]


class Transform(Component, ABC, family="transform"):
    """Settings of one transform."""

    level: ClassVar[Level]
    # Whether it determines the scales that weights are rounded under.
    fixes_scales: ClassVar[bool] = False
    # Bytes per weight of a block that are held while it learns by gradients; 0 if it does not.
    learning_bytes: ClassVar[int] = 0

    @property
    def learning_batch(self) -> int:
        """Sequences that pass a block at once while it learns."""
        return 1

    def unsupported_reason(self, scheme: Scheme) -> str | None:
        """Why such a linear cannot be transformed this way, as a rule to show to a user; None if it can."""
        return None


class Rotation(ABC):
    """Orthonormal U and V of one linear: W' = U W Vᵀ on inputs x' = V x gives y' = U y."""

    @abstractmethod
    def weight(self, weight_OI: Tensor) -> Tensor:
        """W' = U W Vᵀ."""

    @abstractmethod
    def inverse_weight(self, weight_OI: Tensor) -> Tensor:
        """W = Uᵀ W' V."""

    @abstractmethod
    def hessian(self, hessian_II: Tensor) -> Tensor:
        """H' = V H Vᵀ of a symmetric H, symmetric to the last bit, in H's dtype."""

    @abstractmethod
    def input(self, x_TI: Tensor) -> Tensor:
        """Transform inputs, x' = V x for every row, in x's dtype."""

    @abstractmethod
    def inverse_input(self, x_TI: Tensor) -> Tensor:
        """Transform inputs back, x = Vᵀ x' for every row, in x's dtype."""

    @abstractmethod
    def output_gradient(self, g_TO: Tensor) -> Tensor:
        """Gradients with respect to y' from those with respect to y = Uᵀ y', U g for every row, in g's dtype."""

    @abstractmethod
    def output(self, y_TO: Tensor) -> Tensor:
        """Transform outputs back, y = Uᵀ y' for every row, in y's dtype."""

    @abstractmethod
    def pack(self) -> dict[str, Tensor]:
        """The tensors to store; the inverse of `LinearTransform.unpack`."""

    def on(self, device: torch.device) -> Rotation:
        """The same with its tensors on a device; by default they stay where they are."""
        return self

    @cached_property
    def bits(self) -> int:
        """Bits of the stored tensors."""
        return sum(part.numel() * part.element_size() * 8 for part in self.pack().values())

    def statistics(self, statistics: Mapping[str, Tensor], needed: Collection[Statistic]) -> dict[str, Tensor]:
        """The statistics `needed` of x', by kind, from those of x that `LinearTransform.statistics` names."""
        sources = {statistic: statistic.rotates_from for statistic in needed}
        return {
            statistic.kind: statistic.rotated(statistics[source.kind], self)
            for statistic, source in sources.items()
            if source is not None
        }


class LinearTransform(Transform):
    """A rotation for each linear (incoherence processing)."""

    level: ClassVar[Level] = "linear"

    @abstractmethod
    def rotation(self, out_features: int, in_features: int, seed: int) -> Rotation:
        """The rotation of a linear, on the CPU; the same on every machine. V does not depend on out_features."""

    @abstractmethod
    def unpack(self, packed: Mapping[str, Tensor], out_features: int, in_features: int) -> Rotation:
        """The inverse of `Rotation.pack`."""

    def unsupported_reason(self, scheme: Scheme) -> str | None:
        unknown = sorted(statistic.kind for statistic in scheme.statistics if statistic.rotates_from is None)
        if unknown:
            return f"{', '.join(unknown)} of rotated inputs does not follow from statistics of the inputs"
        return None

    def statistics(self, needed: Collection[Statistic]) -> frozenset[Statistic]:
        """The statistics of the inputs from which `needed` follow for the rotated inputs."""
        return frozenset(source for statistic in needed if (source := statistic.rotates_from) is not None)


@lru_cache
@torch.inference_mode(False)
def rotation_on(
    transform: LinearTransform, out_features: int, in_features: int, seed: int, device: torch.device
) -> Rotation:
    """The rotation of every linear of that shape, on a device: an expert's signs take longer to draw than to apply."""
    return transform.rotation(out_features, in_features, seed).on(device)


def unsupported_order(transforms: Sequence[Transform]) -> str | None:
    """Why these transforms cannot be combined in this order; None if they can."""
    kinds = [transform.kind for transform in transforms]
    for earlier, later in itertools.pairwise(transforms):
        if LEVELS.index(earlier.level) > LEVELS.index(later.level):
            return (
                f'"{later.kind}" ({later.level}) must come before "{earlier.kind}" ({earlier.level}): '
                f"the order is {', '.join(LEVELS)}"
            )
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        return f'"{twice}" is named twice'
    linear = [transform.kind for transform in transforms if transform.level == "linear"]
    if len(linear) > 1:
        return f"a linear has one rotation, not {len(linear)}: {', '.join(linear)}"
    block = [transform for transform in transforms if transform.level == "block"]
    if linear and block:
        return f'"{block[0].kind}" cannot be combined with "{linear[0]}": it prepares weights that are not rotated'
    for earlier, later in itertools.pairwise(block):
        if earlier.fixes_scales and later.fixes_scales:
            return f'"{earlier.kind}" and "{later.kind}" both fix the quantization scales: use one of them'
        if earlier.fixes_scales:
            return f'"{later.kind}" must come before "{earlier.kind}", which fixes the scales of the current weights'
    return None
