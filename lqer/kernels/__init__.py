"""Triton kernels for linears on packed weights, beside a torch reference.

    packed = PackedLinear.pack(weight, a, b, bias, activation, torch.bfloat16)
    y = packed_linear(x, packed)

This folder imports torch, triton, lqer.formats and, for linears in a randomized Hadamard basis, lqer.layers and
lqer.transforms. It imports on a machine without a GPU; kernels run on CUDA tensors, or on CPU tensors in Triton's
interpreter (TRITON_INTERPRET=1).
"""

from lqer.kernels.layout import PackedWeight, pack_weight, unpack_codes
from lqer.kernels.linear import packed_linear
from lqer.kernels.module import TritonLinear
from lqer.kernels.packed import DTYPES, PackedLinear, activation_rounding, check_weight

__all__ = [
    "DTYPES",
    "PackedLinear",
    "PackedWeight",
    "TritonLinear",
    "activation_rounding",
    "check_weight",
    "pack_weight",
    "packed_linear",
    "unpack_codes",
]
