"""The inputs of a linear as its quantized self reads them: rounded to its activation format.

    x̂ = Q(x),   or   x̂ = Vᵀ Q(V x)   for a linear whose inputs are rotated by V and rounded in that basis

An error E of the weight costs E‖E x̂‖² at the output, so E[x̂ x̂ᵀ] is the Hessian of a linear that rounds its inputs.
With e = x̂ − x nearly uncorrelated to x it is E[x xᵀ] + E[e eᵀ]: a damping of the size that each direction needs. The
layer should still answer W x, not W x̂: the asymmetric target (lqer/methods/asymmetric.py) with x̂ as the quantized
model's inputs says so.

Shapes: N tokens of a batch, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.formats import NumberFormat
from lqer.transforms import LinearTransform
from lqer.transforms.base import rotation_on


@dataclass(frozen=True)
class InputRounding:
    """The activation format of a linear, and the transform and seed of its rotation; equal for linears that read the
    same x̂ of the same x.
    """

    activation: NumberFormat
    transform: LinearTransform | None = None
    seed: int = 0

    def round(self, x_NI: Tensor) -> Tensor:
        """x̂ of every row, rounded in the dtype of x as the layer does; float32 where a rotation is undone."""
        if self.transform is None:
            return self.activation.fake_quantize(x_NI)
        # The input's rotation does not depend on the linear's outputs.
        rotation = rotation_on(self.transform, 1, x_NI.shape[-1], self.seed, x_NI.device)
        return rotation.inverse_input(self.activation.fake_quantize(rotation.input(x_NI)).to(torch.float32))
