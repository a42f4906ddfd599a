"""What the host sides of the kernels in Gluon share: the linears they take, what runs before, and descriptors.

Shapes: M tokens, I in_features, O out_features, R rank; P marks padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lqer.kernels import runtime
from lqer.kernels.dequantize_launch import project, write_low_rank
from lqer.kernels.input_launch import round_activations
from lqer.kernels.layout.codes import Layout
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.packed import PackedLinear

BITS = 4
GROUPS = 2  # of a strip, at most
DTYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32, torch.int16: gl.int16,
    torch.uint8: gl.uint8,
}  # fmt: skip


def fits_gluon(packed: PackedLinear, x_MI: Tensor) -> bool:
    """Whether they take this linear, MXINT or groups of at least 128 of four bits, on x's GPU.

    A branch is written before the product by the kernel that also rounds x, so x must be rounded.
    """
    layout = packed.spec.layout
    if isinstance(layout, GroupLayout):
        fits = layout.bits == BITS and layout.groups <= GROUPS
    else:
        # MXINT is decoded to bfloat16.
        four_bits = isinstance(layout, Layout) and layout.exponents and layout.bits == BITS
        fits = four_bits and packed.dtype == torch.bfloat16
    return fits and (not packed.spec.rank or packed.spec.rounding.bits > 0) and runtime.is_hopper(x_MI)


@dataclass(frozen=True)
class Prepared:
    """What a product begins with.

    x_MI: rounded if it is to be, in the order of decoded columns [M, IP]. y_MO: to be written, or, if the product
    `adds` to it, what holds the branch and the bias. bias_O: what the product has to add, or None.
    """

    x_MI: Tensor
    y_MO: Tensor
    adds: bool
    bias_O: Tensor | None


def prepare(given_MI: Tensor, packed: PackedLinear, out_dtype: torch.dtype | None) -> Prepared:
    """Round and order x; write the branch, if any, to y [M, O] in `out_dtype`, by default that of x."""
    spec, m = packed.spec, len(given_MI)
    y_MO = given_MI.new_empty(m, spec.layout.rows, dtype=out_dtype)
    if not spec.rank:
        return Prepared(round_activations(given_MI, spec, ordered=True), y_MO, False, packed.bias_O)
    x_MI = given_MI.new_empty(m, spec.layout.padded_columns)
    projection_MR, pdl = given_MI.new_empty(m, spec.rank), runtime.supports_pdl(given_MI)
    project(given_MI, packed, x_MI, projection_MR, ordered=True, pdl=pdl)
    write_low_rank(projection_MR, packed, y_MO, pdl)
    return Prepared(x_MI, y_MO, True, None)


def descriptor(part: Tensor, block: list[int]) -> TensorDescriptor:
    """Of blocks that are copied to shared memory at once."""
    return TensorDescriptor.from_tensor(part, block, gl.NVMMASharedLayout.get_default_for(block, DTYPES[part.dtype]))
