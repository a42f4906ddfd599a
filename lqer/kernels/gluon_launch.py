"""What the host sides of the kernels in Gluon share: which linears they take, and descriptors of what they copy.

Shapes: M tokens, I in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lqer.kernels import runtime
from lqer.kernels.groups import GroupLayout
from lqer.kernels.layout import Layout
from lqer.kernels.packed import PackedLinear

BITS = 4
GROUPS = 2  # of a strip, at most
DTYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32, torch.int16: gl.int16,
    torch.uint8: gl.uint8,
}  # fmt: skip


def fits_gluon(packed: PackedLinear, x_MI: Tensor) -> bool:
    """Whether they take this linear, MXINT or groups of at least 128 of four bits and no branch, on x's GPU."""
    layout = packed.spec.layout
    if isinstance(layout, GroupLayout):
        fits = layout.bits == BITS and layout.groups <= GROUPS
    else:
        # MXINT is decoded to bfloat16.
        four_bits = isinstance(layout, Layout) and layout.exponents and layout.bits == BITS
        fits = four_bits and packed.dtype == torch.bfloat16
    return fits and not packed.spec.rank and runtime.is_hopper(x_MI)


def descriptor(part: Tensor, block: list[int]) -> TensorDescriptor:
    """Of blocks that are copied to shared memory at once."""
    return TensorDescriptor.from_tensor(part, block, gl.NVMMASharedLayout.get_default_for(block, DTYPES[part.dtype]))
