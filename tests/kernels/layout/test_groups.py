"""Integer groups: packing without loss, and the kernels against the layer's formula in float64.

Products of codes and scales are not rounded, so the formula takes the weight in float32.
"""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, DTYPES, ON_GPU, build_layer, random_input, relative_error, replayed

from lqer.formats import Int, MXInt
from lqer.kernels import packed_linear
from lqer.kernels.dequantize_launch import dequantize_weight, run_dequantized
from lqer.kernels.integers.groups_ptx import slots
from lqer.kernels.integers.launch import run_groups
from lqer.kernels.launch import GROUP_TOKENS
from lqer.kernels.layout.groups import GroupLayout, PackedGroups, fits_groups, pack_groups, unpack_groups
from lqer.kernels.reference import reference_linear, reference_weight
from lqer.kernels.tuning import GemmLaunch, group_launch

FORMATS = [
    *(Int(bits, group) for bits in (2, 3, 4, 8) for group in (32, 128)),
    *(Int(bits, 64, symmetric=True, scale_dtype="bfloat16") for bits in (2, 3, 4, 8)),
    Int(4, 256),
    Int(3, 1024),
    Int(2, "row"),
    Int(8, "row", symmetric=True),
]
X8 = MXInt(8)
LAUNCH = GemmLaunch(block_n=64, block_m=8, splits=2, stages=3, warps=4)
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
TOKENS = range(1, 131) if ON_GPU else (1, 2, 7, 8, 9, 17, 33, 130)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_codes_scales_and_values_are_preserved(number_format):
    for n, k in ((75, 300), (16, 20), (64, 1024)):
        weight = number_format.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)))
        packed = pack_groups(weight)
        codes_OI, scales_OG, _ = unpack_groups(packed)
        offset = packed.layout.offset if number_format.symmetric else 0
        assert torch.equal(codes_OI - offset, weight.parts["codes"].to(torch.int16))
        assert torch.equal(scales_OG[:, : weight.parts["scales"].shape[1]], weight.parts["scales"])
        assert torch.equal(reference_weight(packed, torch.float32), weight.dequantize())


def test_a_packed_weight_has_the_bits_of_its_format():
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        packed = pack_groups(Int(bits, 128).quantize(weight))
        assert 8 * packed.nbytes == (bits + 24 / 128) * 1024 * 1024
        assert 8 * pack_groups(Int(bits, 64, symmetric=True).quantize(weight)).nbytes == (bits + 1 / 4) * 1024 * 1024


def test_other_integers_have_the_general_layout():
    others = (Int(5, 128), Int(4, 16), Int(4, 96), Int(4, 128, scale_dtype="float32"), MXInt(4, 32))
    assert not any(fits_groups(number_format) for number_format in others)
    assert all(fits_groups(number_format) for number_format in FORMATS)


def test_groups_along_axis_0_are_refused():
    with pytest.raises(ValueError, match="blocks must be along axis 1"):
        pack_groups(Int(4, 32).quantize(torch.randn(32, 32), axis=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_dequantized_weights_equal_emulation_bit_for_bit(number_format, dtype):
    layer = build_layer(number_format, 75, 300, dtype=dtype)
    assert isinstance(layer.packed.weight, PackedGroups)
    assert torch.equal(dequantize_weight(layer.packed.weight, dtype), layer.weight.dequantize(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_sums_equal_float64_to_a_millionth(number_format, dtype):
    layer = build_layer(number_format, 75, 1100, bias=True, dtype=dtype)
    for m, launch in ((1, LAUNCH), (5, LAUNCH), (9, GemmLaunch(64, 16, 5, 2, 4)), (4, GemmLaunch(128, 8, 1, 3, 4))):
        if slots(layer.packed.spec.layout, launch.block_n, launch.block_m, launch.warps, launch.stages) == 0:
            continue  # more shared memory than there is
        x_MI = random_input(m, 1100, dtype)
        error = relative_error(run_groups(x_MI, layer.packed, launch, torch.float32), layer.exact(x_MI, torch.float32))
        assert error < 1e-6, (m, launch)


@pytest.mark.skipif(not ON_GPU, reason="launches differ only in what the interpreter does not run")
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_every_launch_gives_the_sums(number_format):
    layer = build_layer(number_format, 328, 4200)
    for block_m in (8, 16, 32):
        x_MI = random_input(block_m - 3, 4200)
        exact = layer.exact(x_MI, torch.float32)
        for block_n, splits, warps in ((64, 3, 4), (128, 2, 4), (256, 1, 4), (128, 2, 8), (16, 2, 4), (32, 1, 8)):
            launch = GemmLaunch(block_n, block_m, splits, 3, warps)
            if slots(layer.packed.spec.layout, block_n, block_m, warps, 3) == 0:
                continue  # more shared memory than there is
            assert relative_error(run_groups(x_MI, layer.packed, launch, torch.float32), exact) < 1e-6, launch


def test_values_far_from_zero_are_summed_exactly():
    """Codes, zero points and tokens without a common sign: nothing is cancelled that a code or token is not."""
    generator = torch.Generator().manual_seed(0)
    layer = build_layer(Int(4, 128), 64, 512)
    x_MI = (100 + torch.randn(3, 512, generator=generator)).to(DEVICE, DTYPE)
    magnitude = x_MI.double().abs() @ layer.weight.dequantize().double().abs().T
    error = run_groups(x_MI, layer.packed, LAUNCH, torch.float32) - layer.exact(x_MI, torch.float32)
    assert (error.abs() <= 3e-7 * magnitude).all()


@pytest.mark.parametrize("activation", [None, X8, MXInt(6, 32, "floor")], ids=str)
@pytest.mark.parametrize("rank", [0, 16, 100])
def test_every_rank_and_activation_gives_the_formula(rank, activation):
    layer = build_layer(Int(4, 128), 80, 272, rank=rank, activation=activation, bias=True)
    for m in (1, 9):
        x_MI = random_input(m, 272)
        exact = layer.exact(x_MI, torch.float32)
        assert relative_error(packed_linear(x_MI, layer.packed), exact) < TOLERANCE[DTYPE]
        assert relative_error(run_dequantized(x_MI, layer.packed), exact) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens_gives_the_formula(m):
    layer = build_layer(Int(3, 64), 200, 528, rank=32, activation=X8, bias=True)
    x_MI = random_input(m, 528)
    weight_dtype = torch.float32 if m <= GROUP_TOKENS else None
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI, weight_dtype)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize(("n", "k"), [(16, 16), (75, 20), (64, 256), (130, 257), (320, 1000)])
def test_shapes_need_not_be_multiples_of_a_strip(n, k):
    for number_format, m in ((Int(4, 128), 1), (Int(2, 32), 4), (Int(8, "row"), 9)):
        layer = build_layer(number_format, n, k, rank=16)
        x_MI = random_input(m, k)
        exact = layer.exact(x_MI, torch.float32)
        assert relative_error(packed_linear(x_MI, layer.packed), exact) < TOLERANCE[DTYPE]


def test_the_torch_reference_gives_the_formula():
    layer = build_layer(Int(4, 128), 80, 272, rank=16, activation=X8, bias=True)
    x_MI = random_input(4, 272)
    assert relative_error(reference_linear(x_MI, layer.packed), layer.exact(x_MI)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("m", [1, 12])
def test_ten_runs_give_the_same_bits_and_leave_the_counters_at_zero(m):
    layer = build_layer(Int(4, 128), 200, 1024, rank=32, activation=X8)
    x_MI = random_input(m, 1024)
    first = packed_linear(x_MI, layer.packed)
    for _ in range(9 if ON_GPU else 1):
        assert torch.equal(packed_linear(x_MI, layer.packed), first)
    assert (layer.packed.workspace == 0).all()


def test_rows_of_x_need_not_be_adjacent_or_aligned():
    layer = build_layer(Int(4, 128), 80, 256, rank=16)
    x_MI = random_input(3, 256)
    expected = packed_linear(x_MI, layer.packed)
    for before in (1, 8):
        wide = torch.cat([x_MI[:, :before], x_MI, x_MI], dim=1)
        assert torch.equal(packed_linear(wide[:, before : before + 256], layer.packed), expected)


def test_a_launch_covers_every_strip_with_programs_for_all_tokens():
    for rows, strips, m in ((16, 1, 1), (4096, 16, 1), (11008, 16, 9), (4096, 43, 64), (28672, 32, 33)):
        launch = group_launch(GroupLayout(rows, 256 * strips, 4, 128, False, False), m, 132)
        assert 1 <= launch.splits <= strips
        assert launch.block_m >= min(m, 32)
        sharing = max(1, 16 * launch.warps // launch.block_n)
        assert launch.block_n * sharing % (16 * launch.warps) == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, 1 << 20])
def test_warps_of_few_tokens_copy_ahead_within_the_shared_memory(bits, group):
    for rows, strips in ((16, 1), (1024, 16), (4096, 16), (4096, 56), (11008, 16), (8192, 32), (28672, 32)):
        layout = GroupLayout(rows, 256 * strips, bits, group, False, False)
        for m in (1, 9, 33):
            launch = group_launch(layout, m, 132)
            ahead = slots(layout.compiled, launch.block_n, launch.block_m, launch.warps, launch.stages)
            assert ahead > (0 if (bits, group) == (8, 32) else 1), (launch, ahead)


def test_a_program_has_the_rows_that_are_rounded_together():
    layout = GroupLayout(4096, 4096, 4, 128, False, False)
    for together in (16, 32, 64, 128):
        for m in (1, 9, 33):
            assert group_launch(layout, m, 132, together).block_n % min(together, 64) == 0
    assert group_launch(layout, 1, 132, 128).block_n == 128


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("m", [1, 16, 300])
def test_a_cuda_graph_replays_the_layer_on_new_inputs(m):
    layer = build_layer(Int(4, 128), 200, 1024, rank=32, activation=X8)
    fresh = random_input(m, 1024).flip(0) * 3
    assert torch.equal(replayed(layer.packed, fresh), packed_linear(fresh, layer.packed))
