"""What a transform is: a change of basis, scale or range that a weight is rounded in.

A transform is functions on tensors in a file of its own, and a frozen dataclass deriving from `Transform` that carries
its settings into them. The dataclass is what a configuration's `quantize.transforms` names: `"hadamard"`, or
`{ kind = "hadamard" }` with settings beside the kind. It works at one of three levels:

    model     the whole model, before anything else                        functions of the model do not change
    block     the linears and norms of one decoder block together          with the inputs that reach the block
    linear    one linear: its weight is rounded in another basis, and the layer goes there and back

In a list of transforms the wider level comes first, as it is applied.

Shapes: I in_features, O out_features, T rows of activations.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lqer.components import Component
from lqer.formats import NumberFormat

Level = Literal["model", "block", "linear"]
LEVELS: tuple[Level, ...] = ("model", "block", "linear")
# What `Rotation.statistics` gives; the largest magnitude is not among it.
KNOWN_IN_NEW_BASIS = frozenset({"mean_abs", "mean_square", "autocorrelation"})


@dataclass(frozen=True)
class Scheme:
    """What else a configuration asks of a linear: the formats of its weight and input (None: the model's dtype).

    statistics: what its method and its rounding know of the inputs, by the names of lqer/stages/calibrate.py.
    """

    weight: NumberFormat
    activation: NumberFormat | None
    statistics: frozenset[str]


class Transform(Component, ABC, family="transform"):
    """Settings of one transform."""

    level: ClassVar[Level]
    # Whether the scales that weights are rounded under are settled by it.
    fixes_scales: ClassVar[bool] = False

    def unsupported_reason(self, scheme: Scheme) -> str | None:
        """Why such a linear cannot be transformed this way, as a rule to show to a user; None where it can."""
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
        """R' = V R Vᵀ of a symmetric R, symmetric to the last bit, in R's dtype."""

    @abstractmethod
    def input(self, x_TI: Tensor) -> Tensor:
        """Transform inputs, x' = V x for every row, in x's dtype."""

    @abstractmethod
    def output(self, y_TO: Tensor) -> Tensor:
        """Transform outputs back, y = Uᵀ y' for every row, in y's dtype."""

    @abstractmethod
    def pack(self) -> dict[str, Tensor]:
        """What is stored; `LinearTransform.unpack` reads it."""

    @property
    def bits(self) -> int:
        """Bits of what is stored."""
        return sum(part.numel() * part.element_size() * 8 for part in self.pack().values())

    def statistics(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is known of x' where R = E[x xᵀ] is among what is known of x; nothing where it is not.

        R' = V R Vᵀ in float64, and E[x_i'²] is its diagonal. E|x_i'| is sqrt(2/π) of the root of that: every x_i' is a
        sum over all x, and so nearly normal. By the names of lqer/stages/calibrate.py.
        """
        if "autocorrelation" not in statistics:
            return {}
        autocorrelation_II = self.hessian(statistics["autocorrelation"].to(torch.float64))
        mean_square_I = autocorrelation_II.diagonal().clamp(min=0).to(torch.float32)
        return {
            "autocorrelation": autocorrelation_II,
            "mean_square": mean_square_I,
            "mean_abs": (mean_square_I * (2 / math.pi)).sqrt(),
        }


class LinearTransform(Transform):
    """A basis for each linear."""

    level: ClassVar[Level] = "linear"

    @abstractmethod
    def basis(self, out_features: int, in_features: int, seed: int) -> Rotation:
        """The basis of a linear, the same on every machine; on the CPU."""

    @abstractmethod
    def unpack(self, packed: Mapping[str, Tensor], out_features: int, in_features: int) -> Rotation:
        """The inverse of `Rotation.pack`."""

    def unsupported_reason(self, scheme: Scheme) -> str | None:
        unknown = sorted(scheme.statistics - KNOWN_IN_NEW_BASIS)
        if unknown:
            return f"{', '.join(unknown)} of transformed inputs cannot be told from statistics of the inputs"
        return None

    def statistics(self, needed: frozenset[str]) -> frozenset[str]:
        """What must be known of the inputs so that `needed` is known of the transformed ones."""
        return frozenset({"autocorrelation"}) if needed else frozenset()


def unsupported_order(transforms: Sequence[Transform]) -> str | None:
    """Why these transforms cannot follow one another; None where they can."""
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
        return f"a linear has one basis, not {len(linear)}: {', '.join(linear)}"
    block = [transform for transform in transforms if transform.level == "block"]
    if linear and block:
        return f'"{block[0].kind}" prepares weights for being rounded in their own basis, "{linear[0]}" has another'
    for earlier, later in itertools.pairwise(block):
        if earlier.fixes_scales and later.fixes_scales:
            return f'"{later.kind}" would settle the scales again that "{earlier.kind}" has settled'
        if earlier.fixes_scales:
            return (
                f'"{later.kind}" must come before "{earlier.kind}", whose scales are those of the weights as they are'
            )
    return None
