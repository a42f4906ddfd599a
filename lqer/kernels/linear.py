"""The quantized linear on packed tensors: y = W_q x_q + b + Q(Q(x_q A) B).

    packed = PackedLinear.pack(weight, a, b, bias, activation, torch.bfloat16)
    y = packed_linear(x, packed)

On a GPU this runs one or two Triton kernels, and for many tokens kernels that decode the weight and write the branch,
to which a library adds the product (docs/developer/kernels.md has the regimes). Elsewhere it runs the torch reference,
or, under TRITON_INTERPRET=1, the kernels in Triton's interpreter. No call waits for the device or tunes anything.

Shapes: M tokens, O out_features, I in_features, R rank; P marks padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.kernels.launch import run_layer
from lqer.kernels.packed import PackedLinear, decode_spec, weight_of
from lqer.kernels.reference import reference_linear
from lqer.kernels.runtime import INTERPRETED


def packed_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """y = W_q x_q + b + Q(Q(x_q A) B), x_q = Q(x) where activations are rounded.

    x: (..., I) in packed.dtype -> (..., O) in packed.dtype; sums in float32.
    Raises ValueError for another dtype or width.
    """
    layout = packed.spec.layout
    if x.dtype != packed.dtype or x.shape[-1] != layout.columns:
        raise ValueError(f"x must be (..., {layout.columns}) in {packed.dtype}, found {tuple(x.shape)} in {x.dtype}")
    return torch.ops.lqer.packed_linear(
        x, *packed.weight.parts, packed.bias_O, packed.a_codes, packed.a_exponents, packed.b_codes, packed.b_exponents,
        packed.workspace, packed.input_signs_I, packed.output_signs_O, packed.spec.text,
    )  # fmt: skip


@torch.library.custom_op("lqer::packed_linear", mutates_args=("workspace",))
def _packed_linear(
    x: Tensor,
    words: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    a_codes: Tensor | None,
    a_exponents: Tensor | None,
    b_codes: Tensor | None,
    b_exponents: Tensor | None,
    workspace: Tensor,
    input_signs: Tensor | None,
    output_signs: Tensor | None,
    spec: str,
) -> Tensor:
    decoded = decode_spec(spec)
    packed = PackedLinear(
        decoded, x.dtype, weight_of(decoded.layout, words, high, scales, zeros), bias, a_codes, a_exponents,
        b_codes, b_exponents, workspace, input_signs, output_signs,
    )  # fmt: skip
    x_MI = x.reshape(-1, x.shape[-1])
    if x.is_cuda or INTERPRETED:
        y_MO = run_layer(x_MI, packed)
    else:
        y_MO = reference_linear(x_MI, packed)
    return y_MO.reshape(*x.shape[:-1], decoded.layout.rows)


@_packed_linear.register_fake
def _(
    x, words, high, scales, zeros, bias, a_codes, a_exponents, b_codes, b_exponents, workspace, input_signs,
    output_signs, spec,
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], decode_spec(spec).layout.rows))
