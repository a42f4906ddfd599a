"""The quantized linear as a module: y = W_q x_q + b_q + Q(Q(x_q A) B), emulated in ordinary arithmetic.

x_q is the input rounded to the activation format; where activations are quantized, the rank-r intermediate and the
product are rounded to the same format again (LQER, arXiv 2402.02446, section 4). Every factor holds exactly the values
of its number format wherever the model's dtype can hold it (float32 always, bfloat16 for up to eight significant bits),
so an emulated layer differs from a kernel on packed codes only by the order of summation.

Where the weight was rotated before it was rounded, y = D(s_v) H_Oᵀ (W_q x'_q + ..) + b_q with x' = H_I D(s_u) x:
inputs are rotated, outputs rotated back, and everything in between is rounded in the rotated basis (QuIP#, arXiv
2402.04396; CALDERA, 2405.18886).

Shapes: I in_features, O out_features, R rank, S sampled inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lqer.formats import NumberFormat
from lqer.transforms.block_function import straight_through
from lqer.transforms.hadamard import RandomHadamard, run_rotated


class QuantizedLinear(nn.Module):
    """A linear on dequantized values, in the dtype of the model around it.

    Gradients pass straight through the rounding of activations. weight_OI, bias_O, a_IR, b_RO: any float dtype; bias_O
    and both factors may be None. They are buffers, so that a state_dict is complete.
    """

    weight: Tensor
    bias: Tensor | None
    low_rank_a: Tensor | None
    low_rank_b: Tensor | None

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_IR: Tensor | None,
        b_RO: Tensor | None,
        activation: NumberFormat | None,
    ):
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.activation = activation
        self.register_buffer("weight", weight_OI)
        self.register_buffer("bias", bias_O)
        self.register_buffer("low_rank_a", a_IR)
        self.register_buffer("low_rank_b", b_RO)

    def _round(self, x: Tensor) -> Tensor:
        return x if self.activation is None else straight_through(x, self.activation.fake_quantize)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) in the layer's dtype -> (..., out_features)."""
        x = self._round(x)
        y = F.linear(x, self.weight, self.bias)
        a_IR, b_RO = self.low_rank_a, self.low_rank_b  # each is read once: where it is trained, reading computes it
        if a_IR is None or b_RO is None:
            return y
        return y + self._round(self._round(x @ a_IR) @ b_RO)

    def extra_repr(self) -> str:
        rank = 0 if self.low_rank_a is None else self.low_rank_a.shape[1]
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}, x={self.activation}"


class HadamardLinear(nn.Module):
    """A linear with rotated weights, between the rotation of its input and the inverse rotation of its output.

    inner: the linear with rotated weights, without bias. rotation: signs of the input (I,) and of the output (O,), in
    any float dtype. bias_O: not rotated, in any float dtype, or None.
    """

    input_signs: Tensor
    output_signs: Tensor
    bias: Tensor | None

    def __init__(self, inner: nn.Module, rotation: RandomHadamard, bias_O: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = len(rotation.input_signs_I), len(rotation.output_signs_O)
        self.inner = inner
        self.register_buffer("input_signs", rotation.input_signs_I)
        self.register_buffer("output_signs", rotation.output_signs_O)
        self.register_buffer("bias", bias_O)

    @property
    def rotation(self) -> RandomHadamard:
        return RandomHadamard(self.input_signs, self.output_signs)

    @property
    def weight(self) -> Tensor:
        """A tensor of the weight's shape and dtype, without values: some models read the dtype off their linears."""
        return torch.empty(self.out_features, self.in_features, dtype=self.input_signs.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) in the layer's dtype -> (..., out_features)."""
        return run_rotated(x, self.rotation, self.bias, self.inner)


def output_error(weight_OI: Tensor, quantized_OI: Tensor, sample_SI: Tensor) -> Tensor:
    """|| (W − Ŵ) x ||² / || W x ||² summed over the sampled inputs, float32 (); 0 where W x is 0 throughout."""
    sample_SI = sample_SI.to(weight_OI)
    reference = (sample_SI @ weight_OI.T).square().sum()
    error = (sample_SI @ (weight_OI - quantized_OI).T).square().sum()
    return _ratio(error, reference)


def weight_error(weight_OI: Tensor, quantized_OI: Tensor) -> Tensor:
    """|| W − Ŵ ||_F / || W ||_F, float32 (); 0 for a zero weight."""
    norm = torch.linalg.vector_norm(weight_OI)
    return _ratio(torch.linalg.vector_norm(weight_OI - quantized_OI), norm)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where the whole is 0; decided on the device, because reading it would wait for a GPU."""
    return (part / whole).where(whole > 0, 0.0)
