"""What a decoder block computes around a linear, in the launches of its kernels where these can.

    y = residual + (W x + b), x = RMSNorm(h) = h / sqrt(mean(h²) + eps) ⊙ (offset + w)

The rotation of inputs reads its token as a whole, and H (g ⊙ h / rms) = H (g ⊙ h) / rms, so a norm before it takes no
launch of its own; the rotation of outputs adds a residual to what it stores. Elsewhere torch computes both.

Shapes: M tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """RMSNorm with weight w [I], of the dtype of x. offset: 1.0 where a model stores what it adds to one, else 0.0."""

    weight_I: Tensor
    eps: float
    offset: float

    def apply(self, h_MI: Tensor) -> Tensor:
        """x in the dtype of h, computed in float32."""
        h32_MI = h_MI.to(torch.float32)
        normed_MI = h32_MI * torch.rsqrt(h32_MI.square().mean(1, keepdim=True) + self.eps)
        return (normed_MI * (self.offset + self.weight_I.to(torch.float32))).to(h_MI.dtype)


@dataclass(frozen=True)
class Surroundings:
    """norm: of the inputs, or None. residual_MO: added to the outputs, in their dtype, or None."""

    norm: Norm | None = None
    residual_MO: Tensor | None = None

    def before(self, h_MI: Tensor) -> Tensor:
        """The inputs of the linear."""
        return h_MI if self.norm is None else self.norm.apply(h_MI)

    def after(self, y_MO: Tensor) -> Tensor:
        """The outputs of the linear, with the residual."""
        return y_MO if self.residual_MO is None else self.residual_MO + y_MO

    def split(self, tokens: int, at_once: int) -> Iterator[Surroundings]:
        """Those of each `at_once` of all tokens."""
        for first in range(0, tokens, at_once):
            of_part = None if self.residual_MO is None else self.residual_MO[first : first + at_once]
            yield replace(self, residual_MO=of_part)


NOTHING = Surroundings()
