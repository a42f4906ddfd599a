"""What a decoder block computes before and after a linear, fused into the launches of its kernels where these can.

    y = residual + (W x + b), where x may be
    RMSNorm(h) = h / sqrt(mean(h²) + eps) ⊙ (offset + w), or silu(h) ⊙ up

The rotation of inputs reads its token as a whole, and H (g ⊙ h / rms) = H (g ⊙ h) / rms, so neither takes a launch of
its own; kernels that store outputs add a residual to them. Elsewhere torch computes all this.

Shapes: M tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import silu


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
class Fused:
    """Tensors have the linear's dtype. norm: of the inputs. residual_MO: added to the outputs. up_MI: see above."""

    norm: Norm | None = None
    residual_MO: Tensor | None = None
    up_MI: Tensor | None = None

    def before(self, h_MI: Tensor) -> Tensor:
        """The inputs of the linear."""
        if self.up_MI is not None:
            return silu(h_MI) * self.up_MI
        return h_MI if self.norm is None else self.norm.apply(h_MI)

    def after(self, y_MO: Tensor) -> Tensor:
        """The outputs of the linear, with the residual."""
        return y_MO if self.residual_MO is None else self.residual_MO + y_MO

    def split(self, tokens: int, at_once: int) -> Iterator[Fused]:
        """Those of each `at_once` of all tokens."""
        for first in range(0, tokens, at_once):
            up_MI, residual_MO = (
                whole if whole is None else whole[first : first + at_once] for whole in (self.up_MI, self.residual_MO)
            )
            yield replace(self, up_MI=up_MI, residual_MO=residual_MO)


UNFUSED = Fused()
