"""A linear with lattice or trellis codes in a rotated basis, unpacked and packed, and its formula in float64.

Shapes: M tokens, I in_features, O out_features.
"""

from __future__ import annotations

from typing import Any

import torch
from kernel_layers import DEVICE, DTYPE, random_trellis
from torch import Tensor

from lqer.formats import E8P, Int, NumberFormat, QuantizedTensor, Trellis
from lqer.kernels import PackedLinear
from lqer.transforms.hadamard import hadamard, inverse_hadamard, random_hadamard


class RotatedLayer:
    """The linear of a weight (O, I). rotated: else its basis is the original one. factor: the format of A and B."""

    def __init__(
        self,
        weight: QuantizedTensor,
        rank: int = 0,
        rotated: bool = True,
        bias: bool = False,
        dtype: torch.dtype = DTYPE,
        factor: NumberFormat | None = None,
    ):
        n, k = weight.shape
        generator = torch.Generator().manual_seed(n + 3 * k + rank)

        def random(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)

        factor = factor or Int(4, 32)
        self.weight = weight
        self.a = factor.quantize(random(k, rank, scale=k**-0.5), axis=0) if rank else None
        self.b = factor.quantize(random(rank, n, scale=0.05), axis=0) if rank else None
        self.bias_O = random(n, scale=1.0).to(dtype) if bias else None
        self.basis = random_hadamard(n, k, seed=1).to(dtype) if rotated else None
        self.dtype = dtype
        self.packed = PackedLinear.pack(weight, self.a, self.b, self.bias_O, None, dtype, self.basis)

    def exact(self, x_MI: Tensor) -> Tensor:
        """The formula in float64, with x' and x' A rounded to the dtype of the layer, as it does."""
        x = x_MI.double()
        room = 32.0 if self.dtype == torch.float16 else 1.0
        if self.basis:
            x = hadamard(x * self.basis.input_signs_I.to(x) / room).to(self.dtype).double()
        y = x @ self.weight.dequantize().double().T
        if self.a is not None and self.b is not None:
            a, b = (part.dequantize(self.dtype).double() for part in (self.a, self.b))
            y = y + (x @ a).to(self.dtype).double() @ b
        if self.basis:
            y = inverse_hadamard(y) * self.basis.output_signs_O.to(y) * room
        return y if self.bias_O is None else y + self.bias_O.double()


def lattice_layer(n: int, k: int, rank: int = 0, number_format: E8P | None = None, **options: Any) -> RotatedLayer:
    """A layer whose weight is a random one, quantized; by default to two bits with one scale."""
    weight_OI = 0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(n + 3 * k))
    return RotatedLayer((number_format or E8P(2)).quantize(weight_OI.to(DEVICE)), rank, **options)


def trellis_layer(n: int, k: int, rank: int = 0, number_format: Trellis | None = None, **options: Any) -> RotatedLayer:
    """A layer of random codes, by default of two bits."""
    return RotatedLayer(random_trellis(number_format or Trellis(2), n, k), rank, **options)
