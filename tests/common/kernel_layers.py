"""Random packed linears on the device that runs the kernels: a GPU, or Triton's interpreter on the CPU.

The interpreter truncates float32 to bfloat16 instead of rounding, so its tests use float16.

Shapes: M tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lqer.formats import E8P, Int, MXInt, NumberFormat, QuantizedTensor, Trellis
from lqer.kernels import PackedLinear, packed_linear
from lqer.transforms.hadamard import RandomHadamard, random_hadamard

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,)
DTYPE = DTYPES[0]

# Of the kernels in Gluon: where their tests run, formats and dtypes that they take, how far products may be off.
on_hopper = pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_capability() != (9, 0), reason="kernels in Gluon have no interpreter"
)
GLUON_INTEGERS = [Int(4, 128), Int(4, 128, symmetric=True, scale_dtype="bfloat16"), Int(4, 256), Int(4, "row")]
GLUON_BLOCKS = [MXInt(4), MXInt(4, 32), MXInt(4, 64), MXInt(4, 256), MXInt(4, levels="mid-rise")]
GLUON_KINDS = [(kind, dtype) for kind in GLUON_INTEGERS for dtype in (torch.bfloat16, torch.float16)]
GLUON_KINDS += [(kind, torch.bfloat16) for kind in GLUON_BLOCKS]
# Of weights that are rounded to bfloat16 through two scales: next to ties they are rounded the other way.
GLUON_TOLERANCE = {torch.bfloat16: 1e-4, torch.float16: 2e-6}


@dataclass(frozen=True)
class Layer:
    """A quantized linear, unpacked and packed. weight (O, I), a (I, R), b (R, O)."""

    weight: QuantizedTensor
    a: QuantizedTensor | None
    b: QuantizedTensor | None
    bias_O: Tensor | None
    activation: NumberFormat | None
    packed: PackedLinear

    def exact(self, x_MI: Tensor, weight_dtype: torch.dtype | None = None) -> Tensor:
        """The layer's formula in float64, on values dequantized to the layer's dtype; of the weight, to another one."""

        def rounded(x: Tensor) -> Tensor:
            if self.activation is None:
                return x
            return self.activation.fake_quantize(x.to(torch.float32)).to(torch.float64)

        x = rounded(x_MI).to(torch.float64)
        y = x @ self.weight.dequantize(weight_dtype or self.packed.dtype).to(torch.float64).T
        if self.bias_O is not None:
            y = y + self.bias_O.to(self.packed.dtype).to(torch.float64)
        if self.a is not None and self.b is not None:
            a, b = (f.dequantize(self.packed.dtype).to(torch.float64) for f in (self.a, self.b))
            xa = rounded(x @ a).to(self.packed.dtype).to(torch.float64)
            y = y + rounded(xa @ b)
        return y


def build_layer(
    number_format: NumberFormat,
    n: int,
    k: int,
    rank: int = 0,
    activation: NumberFormat | None = None,
    bias: bool = False,
    dtype: torch.dtype = DTYPE,
    factor: NumberFormat | None = None,
) -> Layer:
    factor = factor or MXInt(8)
    generator = torch.Generator().manual_seed(n * 7 + k * 3 + rank)

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)

    weight = number_format.quantize(random(n, k, scale=0.05))
    a = factor.quantize(random(k, rank, scale=k**-0.5), axis=0) if rank else None
    b = factor.quantize(random(rank, n, scale=0.05), axis=0) if rank else None
    bias_O = random(n, scale=1.0) if bias else None
    packed = PackedLinear.pack(weight, a, b, bias_O, activation, dtype)
    return Layer(weight, a, b, bias_O, activation, packed)


def random_input(m: int, k: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(DEVICE, dtype)


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.to(torch.float64) - exact).norm() / exact.norm())


def replayed(packed: PackedLinear, fresh_MI: Tensor) -> Tensor:
    """The product of inputs that come after a CUDA graph of the linear was captured on others."""
    static_MI = torch.randn_like(fresh_MI)
    packed_linear(static_MI, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_MO = packed_linear(static_MI, packed)
    static_MI.copy_(fresh_MI)
    graph.replay()
    return y_MO


def random_trellis(number_format: Trellis, n: int, k: int, scale: float = 0.05) -> QuantizedTensor:
    """A weight [O, I] of random codes: the search for good ones takes long."""
    generator = torch.Generator().manual_seed(n * 7 + k * 3 + number_format.bits)
    codes = torch.randint(0, 1 << number_format.bits, (n // 16, 16 * k), generator=generator, dtype=torch.uint8)
    parts = {"codes": codes.to(DEVICE), "scales": torch.full((1, 1), scale, device=DEVICE)}
    return QuantizedTensor(number_format, (n, k), 1, parts)


def random_lattice(n: int, k: int, scale: float = 0.05) -> QuantizedTensor:
    """A weight [O, I] of random codes, as above."""
    generator = torch.Generator().manual_seed(n * 7 + k * 3)
    codes = torch.randint(0, 1 << 16, (n, k // 8), generator=generator)
    parts = {"codes": codes.to(DEVICE), "scales": torch.full((1, 1), scale, device=DEVICE)}
    return QuantizedTensor(E8P(2), (n, k), 1, parts)


def rotated_layers(weights: list[QuantizedTensor], rank: int, same_input: bool = True) -> list[PackedLinear]:
    """Linears of one width in a rotated basis, the second one with a bias. same_input: as those of a checkpoint."""
    packed = []
    for place, weight in enumerate(weights):
        n, k = weight.shape
        own = random_hadamard(n, k, seed=place)
        shared = random_hadamard(n, k, seed=0) if same_input else own
        generator = torch.Generator().manual_seed(place)
        a_IR = torch.randn(k, rank, generator=generator).to(DEVICE) * k**-0.5
        b_RO = torch.randn(rank, n, generator=generator).to(DEVICE) * 0.05
        a, b = (MXInt(8).quantize(a_IR, axis=0), MXInt(8).quantize(b_RO, axis=0)) if rank else (None, None)
        bias_O = torch.ones(n, device=DEVICE) if place == 1 else None
        rotation = RandomHadamard(shared.input_signs_I, own.output_signs_O)
        packed.append(PackedLinear.pack(weight, a, b, bias_O, None, DTYPE, rotation))
    return packed
