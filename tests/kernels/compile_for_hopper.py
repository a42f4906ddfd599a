"""Compile every kernel for compute capability 9.0 on a machine without a GPU; run by test_compilation.py.

The interpreter runs kernels as Python and accepts code that the compiler rejects. Here the host code launches kernels
on CPU tensors as usual, and each launch is compiled instead of run.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from kernel_layers import build_layer, random_input, random_trellis
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from lqer.formats import E8P, MX, Codebook, Int, MXInt, NormalFloat, Passthrough, Trellis
from lqer.formats.e8_kernel import nearest
from lqer.formats.kmeans_kernel import cluster_sums, drawn_seeds, improve
from lqer.formats.mxint_kernel import round_values
from lqer.formats.spacing import Spacing
from lqer.formats.viterbi_kernel import best_paths
from lqer.kernels import PackedLinear, runtime
from lqer.kernels.codebooks.launch import run_codebook
from lqer.kernels.decode_attention import decode_attention
from lqer.kernels.dequantize_launch import dequantize_weight, run_dequantized
from lqer.kernels.experts.launch import run_down, run_up
from lqer.kernels.experts.packed import PackedExperts
from lqer.kernels.fusion import Fused, Norm
from lqer.kernels.gluon.stream_launch import run_stream
from lqer.kernels.gluon.tall_launch import run_tall
from lqer.kernels.halves import TOKENS_AT_ONCE as HALVES_AT_ONCE
from lqer.kernels.integers.launch import run_gemm, run_gemv, run_groups, run_wide
from lqer.kernels.joint import join
from lqer.kernels.launch import run_layer
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.layout.trellis import TrellisLayout
from lqer.kernels.tuning import WIDE_AT_ONCE, GemmLaunch, GemvLaunch, stream_launch, tall_launch, wide_launch
from lqer.rounding.lattice_sweep import sweep_lattice_panel
from lqer.rounding.lattice_tuning import tune_lattice_panel
from lqer.rounding.level_sweep import sweep_level_panel
from lqer.rounding.soft import Grid
from lqer.rounding.soft_kernel import FusedSoftWeight
from lqer.rounding.sweep import descend_panel
from lqer.rounding.sweep import sweep_panel as sweep_columns
from lqer.rounding.vector_sweep import sweep_panel
from lqer.statistics.products_kernel import add_half_products
from lqer.transforms.hadamard import random_hadamard
from lqer.transforms.hadamard_kernel import factors_on, transform
from lqer.transforms.lwc_kernel import FusedRounding

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8",
    torch.int64: "*i64", torch.uint8: "*u8", torch.float64: "*fp64", torch.int16: "*i16", torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
SHARED_MEMORY = 48 << 10
# Of a multiprocessor; of shared memory, what the driver has of a program's.
REGISTERS, MULTIPROCESSOR_MEMORY, RESERVED_MEMORY = 1 << 16, 228 << 10, 1 << 10
compiled: set[str] = set()


def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
    bound = inspect.signature(self.fn).bind(*args, **kwargs).arguments
    signature, constants, attributes = {}, {}, {}
    for position, (parameter, (name, value)) in enumerate(zip(self.params, bound.items(), strict=True)):
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            element = TYPES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if self.is_gluon() else ASTSource)(
        fn=self, signature=signature, constexprs=constants, attrs=attributes
    )
    kernel = triton.compile(source, target=HOPPER, options=options)
    check_shared_memory(kernel)
    if self.fn.__name__ == "lattice_product_kernel":
        check_that_nothing_is_computed_twice(kernel, 4 * constants["span"])
    if self.fn.__name__ == "trellis_product_kernel":
        check_that_nothing_is_computed_twice(kernel, constants["span"] * constants["BLOCK_M"])
        check_that_the_table_stays(kernel, constants["layout"])
    if self.fn.__name__ == "lattice_halves_kernel":
        products = 8 * constants["groups"] * constants["BLOCK_M"] // HALVES_AT_ONCE
        assert kernel.asm["ttir"].count("mma.sync") == products, "of one turn"
    if self.fn.__name__.startswith("rotate_"):
        check_that_no_exchange_is_repeated(kernel)
        stored_by_lanes = constants.get("kind") in (None, "bytes", "integers", "halves") and not constants.get("rank")
        if constants["lanes"] and stored_by_lanes:
            check_that_warps_meet_once(kernel)
    if self.fn.__name__ == "resident_product_kernel":
        assert kernel.asm["ttir"].count("mma.sync") == products_of_resident(constants), "of one row group"
    wide = self.fn.__name__ == "gemm_kernel" and constants["ordered"] and isinstance(constants["layout"], GroupLayout)
    if wide and not constants["rank"]:
        check_that_weights_stay_in_registers(kernel)
        check_how_many_share_a_multiprocessor(kernel, WIDE_AT_ONCE)
    if self.fn.__name__ in ("tall_kernel", "stream_kernel"):
        check_that_products_overlap(kernel)
    compiled.add(self.fn.__name__)


def check_shared_memory(kernel: Any) -> None:
    """Triton requests more than 48 KB from the driver only if its own part, without that of inline PTX, needs more.

    Its part follows, and operands of tensor cores in it start at multiples of 1 KB only if it does.
    """
    reserved = sum(int(size) for size in re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", kernel.asm["ptx"]))
    assert reserved % 1024 == 0, reserved
    assert reserved == 0 or reserved + kernel.metadata.shared <= SHARED_MEMORY, (reserved, kernel.metadata.shared)


def products_of_resident(constants: dict[str, Any]) -> int:
    """Of a warp's tiles; in float16 also those that add bytes, and, before all row groups, tokens."""
    return constants["tiles"] * (16 if constants["integers"] else 16 + 16 * constants["BLOCK_M"] // HALVES_AT_ONCE)


def check_that_nothing_is_computed_twice(kernel: Any, products: int) -> None:
    """Each warp computes the products of a tile once (lattice/gemm.py)."""
    assert kernel.asm["ptx"].count("mma.sync") == products


def check_that_no_exchange_is_repeated(kernel: Any) -> None:
    """Lanes exchange values, which must not happen in a layout in which they have others (rotations/kernels.py)."""
    assert kernel.asm["ttgir"].count("shfl.sync") == kernel.asm["ttir"].count("shfl.sync")


def check_that_warps_meet_once(kernel: Any) -> None:
    """Where they leave their sums: nothing changes the layout of what lanes have, which would take a barrier each."""
    assert kernel.asm["sass"].count("BAR.SYNC") == 1


def check_that_the_table_stays(kernel: Any, layout: TrellisLayout) -> None:
    """Shared memory is as large as the table, so it lies at the beginning, and only it is written before products."""
    assert kernel.metadata.shared == 4 * layout.table_words
    before, _, _ = kernel.asm["ptx"].rpartition("mma.sync")
    assert len(re.findall(r"bar\.sync|barrier\.sync|barrier\.cta\.sync", before)) == 1
    lines = before.splitlines()
    stores = [number for number, line in enumerate(lines) if "st.shared" in line]
    loads = [number for number, line in enumerate(lines) if "ld.shared" in line]
    assert max(stores) < min(loads)


def check_that_weights_stay_in_registers(kernel: Any) -> None:
    """Decoded strips are operands of wgmma as they are: nothing is stored to shared memory between them."""
    first, *_, last = (place.start() for place in re.finditer(r"wgmma\.mma_async", kernel.asm["ptx"]))
    assert "st.shared" not in kernel.asm["ptx"][first:last]


def check_how_many_share_a_multiprocessor(kernel: Any, programs: int) -> None:
    """More would not be spread evenly over the multiprocessors, fewer would leave room (tuning.py)."""
    registers = 1 + max(int(number) for number in re.findall(r"\bR(\d+)", kernel.asm["sass"]))
    by_registers = REGISTERS // (32 * kernel.metadata.num_warps * 8 * -(-registers // 8))
    by_memory = MULTIPROCESSOR_MEMORY // (kernel.metadata.shared + RESERVED_MEMORY)
    assert min(by_registers, by_memory) == programs, (registers, kernel.metadata.shared)


def check_that_products_overlap(kernel: Any) -> None:
    """Nothing waits for tensor cores but the kernel itself: in both halves of a turn, and at the end."""
    assert kernel.asm["sass"].count("WARPGROUP.DEPBAR") == 3


def compile_joint() -> None:
    """Linears side by side: ranks of each, and rotations of outputs of two lengths."""
    x8, bf16 = MXInt(8), torch.bfloat16
    for number_format, activation, tokens in ((MXInt(4), x8, (1, 16, 300)), (Int(4, 128), None, (1, 16))):
        layers = [build_layer(number_format, n, 1024, 32, activation, dtype=bf16).packed for n in (256, 64)]
        for m in tokens:
            run_layer(random_input(m, 1024, bf16), join(layers))
    for make, rank, tokens in (
        (lambda n: build_layer(E8P(2), n, 1024).weight, 64, (1, 16)),
        (lambda n: random_trellis(Trellis(2, table="bytes"), n, 1024), 16, (1, 16)),
        (lambda n: random_trellis(Trellis(2), n, 1024), 16, (1,)),
    ):
        factors = [build_layer(MXInt(4), n, 1024, rank) for n in (512, 128)]
        layers = [
            PackedLinear.pack(make(n), of.a, of.b, None, None, bf16, random_hadamard(n, 1024, 0))
            for n, of in zip((512, 128), factors, strict=True)
        ]
        # Signs of inputs depend on the number of outputs in this draw.
        layers = [replace(layer, input_signs_I=layers[0].input_signs_I) for layer in layers]
        for m in tokens:
            run_layer(random_input(m, 1024, bf16), join(layers))


def compile_experts(number_format: Any, gate: str, tokens: int, rank: int, activation: Any) -> None:
    """Both launches of two experts of eight outputs per token, at the tile of so many tokens."""
    up, down = (
        PackedExperts.stack(
            [[build_layer(number_format, n, k, rank=rank, activation=activation, dtype=torch.bfloat16).packed] * halves]
            * 2
        )
        for n, k, halves in ((256, 512, 2), (512, 256, 1))
    )
    index_TK = torch.arange(2 * tokens).view(tokens, 2) % 2
    hidden, *routes = run_up(random_input(tokens, 512, torch.bfloat16), index_TK, up, down.spec, gate)
    hidden = hidden if gate else hidden[:, 0]
    run_down(hidden, *routes, index_TK, torch.ones(tokens, 2), down, up.spec, bool(gate))


def main() -> None:
    JITFunction.run = compile_instead
    runtime.supports_pdl = lambda x: True
    x8, bf16 = MXInt(8), torch.bfloat16
    rising = [MXInt(bits, levels="mid-rise") for bits in (2, 3, 4, 8)]
    for number_format in (MXInt(4), MXInt(2), MXInt(3), MXInt(3, 32), MXInt(8), Int(4, 16), *rising):
        layer = build_layer(number_format, 128, 1024, dtype=bf16)
        run_gemm(random_input(16, 1024, bf16), layer.packed, GemmLaunch(128, 16, 4, 3, 4))
    for number_format in (MXInt(4), MXInt(4, levels="mid-rise")):
        layer = build_layer(number_format, 128, 1024, rank=32, activation=x8, bias=True, dtype=bf16)
        run_gemv(random_input(1, 1024, bf16), layer.packed, GemvLaunch(16, 4, 4))
    run_gemm(random_input(64, 1024, bf16), layer.packed, GemmLaunch(128, 64, 2, 3, 8))
    run_dequantized(random_input(300, 1024, bf16), layer.packed)
    for number_format, block_n, m in (
        (Int(4, 128), 64, 1), (Int(4, 32, symmetric=True), 128, 16), (Int(3, 128), 64, 8), (Int(2, 64), 128, 4),
        (Int(8, 128, scale_dtype="bfloat16"), 64, 32), (Int(4, "row"), 64, 16),
    ):  # fmt: skip
        layer = build_layer(number_format, 128, 2048, dtype=bf16)
        block_m = max(8, m)
        run_groups(random_input(m, 2048, bf16), layer.packed, GemmLaunch(block_n, block_m, 3, 3, 4))
    for m, dtype in ((1, bf16), (16, torch.float16)):
        layer = build_layer(Int(4, 128), 200, 1000, rank=64, activation=x8, bias=True, dtype=dtype)
        launch, residual_MO = GemmLaunch(64, max(8, m), 2, 3, 4), random_input(m, 200, dtype)
        run_groups(random_input(m, 1000, dtype), layer.packed, launch, residual_MO=residual_MO)
        dequantize_weight(layer.packed.weight, dtype)
    for number_format, m, dtype in ((Int(4, 128), 64, bf16), (Int(4, "row", symmetric=True), 32, torch.float16)):
        layer = build_layer(number_format, 256, 1024, dtype=dtype)
        run_wide(random_input(m, 1024, dtype), layer.packed, wide_launch(layer.packed.spec.layout, m, 132))
    for number_format, dtype in (
        (Int(4, 128), torch.float16), (Int(4, "row", symmetric=True), bf16), (MXInt(4), bf16),
        (MXInt(4, 32, levels="mid-rise"), bf16),
    ):  # fmt: skip
        layer = build_layer(number_format, 256, 1024, dtype=dtype).packed
        for m in (64, 128):
            run_stream(random_input(m, 1024, dtype), layer, stream_launch(layer.spec.layout, m, 132))
        run_tall(random_input(300, 1024, dtype), layer, tall_launch(layer.spec.layout, 300, 132))
    layer = build_layer(MXInt(4), 200, 1024, 32, x8, bias=True, dtype=bf16).packed
    run_stream(random_input(128, 1024, bf16), layer, stream_launch(layer.spec.layout, 128, 132))
    run_tall(random_input(300, 1024, bf16), layer, tall_launch(layer.spec.layout, 300, 132))
    # What needs most of the shared memory.
    for number_format, rank, m in (
        (Int(3, 64), 32, 42),
        (Int(4, 128), 100, 9),
        (Int(8, "row"), 16, 9),
        (Int(8, 32), 0, 33),
    ):
        run_layer(random_input(m, 528, bf16), build_layer(number_format, 200, 528, rank=rank, dtype=bf16).packed)
    for number_format, gate, tokens, rank, activation in (
        (Int(4, 128), "silu", 1, 0, None), (Int(4, 128, symmetric=True), "gelu", 64, 32, x8),
        (MXInt(4), "silu", 1, 32, x8), (MXInt(4), "", 40, 0, None), (Int(3, 64), "gelu_tanh", 8, 16, None),
        (Int(4, 128), "silu", 300, 0, None),
    ):  # fmt: skip
        compile_experts(number_format, gate, tokens, rank, activation)
    layer = build_layer(Int(6, "row"), 75, 300, rank=100, dtype=torch.float16, factor=Passthrough("float16"))
    run_gemm(random_input(3, 300, torch.float16), layer.packed, GemmLaunch(64, 16, 1, 3, 4))
    for number_format, m, rank in (
        (Codebook(2, 2, 2048), 1, 32), (Codebook(2, 2, 2048), 8, 32), (Codebook(2, 1, 256), 3, 0),
        (Codebook(3, 1, 7 * 256), 1, 0), (Codebook(2, 4, 16384), 1, 0),
    ):  # fmt: skip
        layer = build_layer(number_format, 64, 512, rank=rank, activation=x8 if rank else None, dtype=bf16)
        run_codebook(random_input(m, 512, bf16), layer.packed)
        dequantize_weight(layer.packed.weight, bf16)
    layer = build_layer(Codebook(2, 1, 64 * 66, 66), 64, 201, dtype=torch.float16)
    run_codebook(random_input(2, 201, torch.float16), layer.packed)
    run_dequantized(random_input(32, 201, torch.float16), layer.packed)
    for dtype, rank in ((bf16, 64), (torch.float16, 0)):
        lattice = build_layer(E8P(2), 64, 2048, rank=rank, dtype=dtype)
        packed = PackedLinear.pack(
            lattice.weight, lattice.a, lattice.b, None, None, dtype, random_hadamard(64, 2048, 0)
        )
        norm = Norm(torch.ones(2048, dtype=dtype), 1e-5, 0.0)
        for m in (1, 8, 16, 65):
            run_layer(random_input(m, 2048, dtype), packed)
            run_layer(random_input(m, 2048, dtype), packed, Fused(norm, random_input(m, 64, dtype)))
            run_layer(random_input(m, 2048, dtype), packed, Fused(up_MI=random_input(m, 2048, dtype)))
            run_layer(random_input(m, 2048, dtype), lattice.packed)
    for n, k, rank, m in ((64, 256, 16, 3), (128, 1024, 256, 1), (128, 1024, 256, 4), (128, 1024, 256, 16)):
        run_layer(random_input(m, k, bf16), build_layer(E8P(2), n, k, rank=rank, dtype=bf16).packed)
    for bits, state_bits, table, m, rank in (
        (1, 12, "gaussian", 1, 0), (2, 12, "gaussian", 1, 64), (3, 13, "gaussian", 16, 16), (3, 12, "gaussian", 4, 0),
        (4, 16, "gaussian", 9, 0), (1, 12, "bytes", 1, 0), (2, 12, "bytes", 16, 64), (3, 16, "bytes", 4, 16),
        (3, 12, "bytes", 64, 16), (4, 14, "bytes", 1, 64), (2, 12, "bytes", 2, 192), (2, 12, "bytes", 17, 192),
    ):  # fmt: skip
        weight = random_trellis(Trellis(bits, state_bits, table), 256, 2048)
        other = build_layer(MXInt(4), 256, 2048, rank=rank)
        packed = PackedLinear.pack(weight, other.a, other.b, None, None, bf16, random_hadamard(256, 2048, 0))
        run_layer(random_input(m, 2048, bf16), packed)
        norm = Norm(torch.ones(2048, dtype=bf16), 1e-6, 1.0)
        run_layer(random_input(m, 2048, bf16), packed, Fused(norm, random_input(m, 256, bf16)))
        run_layer(random_input(m, 2048, bf16), packed, Fused(up_MI=random_input(m, 2048, bf16)))
        if state_bits in (14, 16):
            run_layer(random_input(65, 2048, bf16), packed)
    compile_joint()
    runtime.multiprocessors = lambda device: 132
    for heads, groups, width in ((32, 32, 128), (32, 8, 64)):
        q_BHTD, k_BGSD = torch.zeros(1, heads, 1, width, dtype=bf16), torch.zeros(1, groups, 500, width, dtype=bf16)
        decode_attention(q_BHTD, k_BGSD, k_BGSD, torch.ones(1, 1, 1, 500, dtype=torch.bool), 0.1)
    for bits, state_bits in ((2, 12), (3, 12), (4, 12), (2, 16)):
        x_NP, table_S = torch.zeros(3, 256), torch.zeros(1 << state_bits, dtype=torch.float16)
        best_paths(x_NP, table_S, bits, best_paths(x_NP, table_S.float(), bits)[:, 0] >> bits)
    for features, dtype, lower in ((256, bf16, True), (300, torch.float16, False)):
        x_NI = random_input(200, features, dtype)
        add_half_products(torch.zeros(features, features, dtype=torch.float64), x_NI, x_NI, lower)
    for centroids, dimension in ((4, 1), (16, 2), (256, 4)):
        features_GFN, codes_GN = torch.zeros(3, 2 * dimension, 1024), torch.zeros(3, 1024, dtype=torch.uint8)
        x_GND, centroids_GKD = torch.zeros(3, 1024, dimension), torch.zeros(3, centroids, dimension)
        improve(x_GND, features_GFN, drawn_seeds(x_GND, x_GND, centroids_GKD[..., 0].double(), 1.0), 1)
        cluster_sums(features_GFN, codes_GN, centroids)
        panel_PO, feedback_PP = torch.zeros(128, 24), torch.zeros(256, 256)[128:, 128:]
        sweep_panel(panel_PO, panel_PO, panel_PO[:, :1], feedback_PP, centroids_GKD)
    compile_rounding()
    for shape, axis in (((3, 2, 64), 2), ((3, 64, 2), 1)):
        for ceil, dtype in ((True, bf16), (False, torch.float32)):
            round_values(torch.ones(shape, dtype=dtype), 16, axis, 7, ceil, 127)
    for length, count in ((4096, 300), (11008, 300), (1536, 1)):
        signs_I = torch.ones(length, dtype=bf16)
        factors = factors_on(length, False, bf16, signs_I.device)
        # On a GPU they are in half precision.
        factors = replace(factors, outer_PAA=factors.outer_PAA.to(bf16), inner_BB=factors.inner_BB.to(bf16))
        transform(torch.ones(count, length, dtype=bf16), signs_I, factors, signs_first=count == 1)
    print(" ".join(sorted(compiled)))


def compile_rounding() -> None:
    """What rounds weights column by column, and what learns how to."""
    nearest(torch.zeros(100, 8))
    panel_PO, square_PP, step_PO = torch.zeros(128, 64), torch.zeros(256, 256)[128:, 128:], torch.ones(128, 64)
    for bits in (2, 3, 4):
        sweep_lattice_panel(panel_PO, panel_PO, square_PP, torch.ones(1).expand(64), bits)
        scale_KO, codes_KO = torch.ones(16, 64), torch.zeros(16, 64, dtype=torch.int64)
        tune_lattice_panel(panel_PO, panel_PO, square_PP, square_PP, scale_KO, codes_KO, bits)
    for limits in ((0, 15), (-4, 3)):
        spacing = Spacing(step_PO[:1].expand(128, -1), step_PO, *limits)
        sweep_columns(panel_PO[:, None], square_PP[None], spacing)
        sweep_columns(panel_PO[:, None], square_PP[None], spacing, panel_PO[:, None])
    for number_format in (NormalFloat(4), MX("mxfp6_e3m2")):
        levels = number_format.fixed_levels(number_format.fit(panel_PO.unsqueeze(1)))
        # What is not run leaves any byte as the number of a level.
        levels = replace(levels, step_G=step_PO, codes_K=torch.zeros(256, dtype=torch.uint8))
        sweep_level_panel(panel_PO[:, None], square_PP[None], levels, panel_PO[:, None])
    descend_panel(panel_PO, panel_PO, panel_PO, square_PP, step_PO, (0, 15))
    for block_size, dtype in ((128, torch.bfloat16), (16, torch.float32), ("row", torch.bfloat16)):
        weight_OI, number_format = torch.ones(4, 4096), Int(2, block_size)
        grid = Grid.of(weight_OI, number_format.quantize(weight_OI))
        step_ON = grid.spacing.step_G.clone().requires_grad_()
        FusedSoftWeight.apply(torch.zeros_like(weight_OI, requires_grad=True), step_ON, grid, dtype).sum().backward()
        FusedRounding.apply(weight_OI, step_ON, grid.zero_ON, number_format, dtype).sum().backward()


if __name__ == "__main__":
    sys.exit(main())
