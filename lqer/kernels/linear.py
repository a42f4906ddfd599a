"""The quantized linear on packed tensors, and its operator torch.ops.lqer.packed_linear.

    packed = PackedLinear.pack(weight, a, b, bias, activation, torch.bfloat16)
    y = packed_linear(x, packed)

y = W_q x_q + b + Q(Q(x_q A) B). On a GPU, few tokens take one to three Triton kernels; for many tokens, kernels
dequantize the weight and compute the low-rank branch, and a library multiplies (docs/developer/kernels.md lists the
regimes). On a CPU this is the torch reference or, with TRITON_INTERPRET=1, the kernels in Triton's interpreter. A call
neither synchronizes with the device nor tunes anything.

Shapes: M tokens, I in_features, O out_features, R rank; a P after a letter means padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.kernels.fusion import Fused, Norm
from lqer.kernels.input_launch import dense_rows
from lqer.kernels.launch import run_layer
from lqer.kernels.packed import PackedLinear, weight_of
from lqer.kernels.reference import reference_linear
from lqer.kernels.runtime import INTERPRETED
from lqer.kernels.spec import decode_spec


def packed_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """y = W_q x_q + b + Q(Q(x_q A) B), with x_q = Q(x) if activations are rounded; sums in float32.

    x: (..., I) in packed.dtype -> (..., O) in packed.dtype.
    Raises ValueError for another dtype or width.
    """
    layout = packed.spec.layout
    if x.dtype != packed.dtype or x.shape[-1] != layout.columns:
        raise ValueError(f"x must be (..., {layout.columns}) in {packed.dtype}, found {tuple(x.shape)} in {x.dtype}")
    return OPERATOR(
        x, *packed.weight.parts, packed.bias_O, packed.a_codes, packed.a_exponents, packed.b_codes, packed.b_exponents,
        packed.workspace, packed.input_signs_I, packed.output_signs_O, packed.spec.text,
    )  # fmt: skip


# The workspace is as it was when the call ends, so the operator changes none of its arguments: torch.compile needs
# neither to copy it nor to keep calls in order.
@torch.library.custom_op("lqer::packed_linear", mutates_args=())
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
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """y (..., O) of x; shapes are those of PackedLinear, dtype is that of x, all tensors contiguous except x.

    x             (..., I) bfloat16 or float16
    words         int32: codes of layout/codes.py or indices of layout/codebook.py; int64 units of layout/lattice.py
    high          int32: high bits of three-bit codes; the table of lattice codes; else None
    scales        uint8 step exponents of MXINT, float scales of int, the table of a codebook, float32 [OP] of lattices
    zeros         uint8 zero points of asymmetric int, like scales; else None
    bias          [O] in dtype, or None
    a_codes       Aᵀ [RP, IP] int8 codes, or values in dtype; None at rank 0
    a_exponents   [RP, IP / a_block] uint8, or None
    b_codes       B [RP, O] int8 codes, or values in dtype; None at rank 0
    b_exponents   [RP / b_block, O] uint8, or None
    workspace     [counters] int32, zero before and after
    input_signs   [I] in dtype, or None
    output_signs  [O] in dtype, or None
    spec          encode_spec of the Spec that all of this is laid out by
    norm          [I] in dtype, or None: weight of an RMSNorm of x before the linear, with its norm_eps and norm_offset
    residual      (..., O) in dtype, or None: added to y
    up            (..., I) in dtype, or None: silu(x) ⊙ up is what the linear multiplies, without a norm
    """
    decoded = decode_spec(spec)
    packed = PackedLinear(
        decoded, x.dtype, weight_of(decoded.layout, words, high, scales, zeros), bias, a_codes, a_exponents,
        b_codes, b_exponents, workspace, input_signs, output_signs,
    )  # fmt: skip
    rows, columns = decoded.layout.rows, x.shape[-1]
    fused = Fused(
        None if norm is None else Norm(norm, norm_eps, norm_offset),
        None if residual is None else residual.reshape(-1, rows).contiguous(),
        None if up is None else dense_rows(up.reshape(-1, columns)),
    )
    x_MI = x.reshape(-1, columns)
    if x.is_cuda or INTERPRETED:
        y_MO = run_layer(x_MI, packed, fused)
    else:
        y_MO = fused.after(reference_linear(fused.before(x_MI), packed))
    return y_MO.reshape(*x.shape[:-1], rows)


@_packed_linear.register_fake
def _(
    x, words, high, scales, zeros, bias, a_codes, a_exponents, b_codes, b_exponents, workspace, input_signs,
    output_signs, spec, norm=None, norm_eps=0.0, norm_offset=0.0, residual=None,
    up=None,
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], decode_spec(spec).layout.rows))


OPERATOR = torch.ops.lqer.packed_linear.default
