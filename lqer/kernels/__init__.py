"""Triton kernels for linears on packed weights, with a torch reference.

    packed = PackedLinear.pack(weight, a, b, bias, activation, torch.bfloat16)
    y = packed_linear(x, packed)

runtime             interpreter or GPU, programmatic dependent launch
layout, groups, codebook, lattice, trellis     packed weights: integer codes, integers in groups with float scales,
                    learned codebooks, E8P lattice codes, trellis codes; tiles is what the last two have in common
packed, spec, linear, module        a packed linear, what its kernels are compiled for, its operator, its module;
                    reference is the same in torch, and first_use compares them; fusion is what a block computes
                    before and after a linear
joint, siblings     linears of one input side by side, and their modules
experts_packed, experts_module     the same of all experts of a layer, stacked; experts_reference in torch
launch              which kernels run how many tokens; *_launch is the host side of each regime, tuning its table
gemv, gemm, stream_gemm with stream_sums, tall_gemm, codebook_kernels, lattice_gemm, lattice_halves_gemm, trellis_gemm,
resident_gemm, dequantize, byte_sums_dequantize     the kernels of the regimes
experts, routing    the kernels for experts
rotations           the kernels around products with lattice and trellis codes, with rotations_lanes, rotations_ptx and
                    token_stores
activations, low_rank, branch, split_k, rounding, fetch, decode, lattice_decode, lattice_halves, trellis_decode,
byte_sums with byte_products, halves, resident with resident_ptx, groups_decode with groups_ptx, groups_wide,
gluon_decode with tall_decode and stream_decode, ordered_tokens     what they share
decode_attention    attention of one token over a static cache

It imports on a machine without a GPU; kernels run on CUDA tensors, or on CPU tensors in Triton's interpreter
(TRITON_INTERPRET=1).

Letters in all files of this folder: I in_features, O out_features, R rank, M tokens (rows of x); a P after a letter
means padded (RP, IP). Size arguments of kernels keep BLAS's names: M tokens, N out_features, K in_features, and
BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R of them at once. The suffix _C marks a constant as compile-time (tl.constexpr).
"""

from lqer.kernels.experts_module import GroupedExperts
from lqer.kernels.experts_packed import PackedExperts
from lqer.kernels.first_use import calls_of, compare_experts_once, compare_fused_once, compare_once
from lqer.kernels.layout import PackedWeight, pack_weight, unpack_codes
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
