"""Triton kernels for linears on packed weights, with a torch reference.

    packed = PackedLinear.pack(weight, a, b, bias, activation, torch.bfloat16)
    y = packed_linear(x, packed)

packed, spec, linear, module        a packed linear, what its kernels are compiled for, its operator, its module;
                    reference is the same in torch, and first_use compares them
fusion              what a decoder block computes before and after a linear, where kernels take it in
joint, siblings     linears of one input side by side, and their modules
layout/             memory of packed weights: integer codes, integers in groups with float scales, learned codebooks,
                    E8P lattice codes, trellis codes
launch              which kernels run how many tokens; the launch.py of a folder is the host side of its kernels,
                    tuning its table of measured launches, input_launch what all of them do with tokens
integers/           integer codes and groups: one token, and a few
gluon/              four-bit codes, 33 tokens and more
codebooks/, lattice/, trellis/      codebooks, lattice codes, trellis codes
rotations/          Hadamard rotations around products with lattice and trellis codes
dequantize          many tokens: the weight is written to memory for a library's product
experts/            all experts of a layer, stacked
decode_attention    attention of one token over a static cache
activations, low_rank, branch, split_k, rounding, fetch, decode, halves, ordered_tokens, runtime     what they share

It imports on a machine without a GPU; kernels run on CUDA tensors, or on CPU tensors in Triton's interpreter
(TRITON_INTERPRET=1).

Letters in all files of this folder: I in_features, O out_features, R rank, M tokens (rows of x); a P after a letter
means padded (RP, IP). Size arguments of kernels keep BLAS's names: M tokens, N out_features, K in_features, and
BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R of them at once. The suffix _C marks a constant as compile-time (tl.constexpr).
"""

from lqer.kernels.experts.module import GroupedExperts
from lqer.kernels.experts.packed import PackedExperts
from lqer.kernels.first_use import calls_of, compare_experts_once, compare_fused_once, compare_once
from lqer.kernels.layout.codes import PackedWeight, pack_weight, unpack_codes
from lqer.kernels.linear import packed_linear
from lqer.kernels.module import TritonLinear
from lqer.kernels.packed import DTYPES, PackedLinear, activation_rounding, check_weight

__all__ = [
    "DTYPES",
    "GroupedExperts",
    "PackedExperts",
    "PackedLinear",
    "PackedWeight",
    "TritonLinear",
    "activation_rounding",
    "calls_of",
    "check_weight",
    "compare_experts_once",
    "compare_fused_once",
    "compare_once",
    "pack_weight",
    "packed_linear",
    "unpack_codes",
]
