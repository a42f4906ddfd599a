"""The kernels against the layer's formula in float64: formats, shapes, ranks, tokens, determinism, graphs.

Triton's interpreter runs a few small shapes; a GPU runs every number of tokens up to 130.
"""

from __future__ import annotations

import ptx
import pytest
import torch
from kernel_layers import DEVICE, DTYPE, DTYPES, ON_GPU, build_layer, random_input, relative_error, replayed

from lqer.formats import Int, MXInt, Passthrough
from lqer.kernels import packed_linear
from lqer.kernels.decode import pairs_asm
from lqer.kernels.dequantize_launch import dequantize_weight, run_dequantized
from lqer.kernels.integers.launch import fits_gemv, run_gemm, run_gemv
from lqer.kernels.reference import reference_linear
from lqer.kernels.spec import decode_spec, encode_spec
from lqer.kernels.tuning import GemmLaunch, GemvLaunch

FORMATS = [
    *(MXInt(bits, block) for bits in (2, 3, 4, 8) for block in (16, 32)),
    MXInt(5),
    *(MXInt(bits, 32, levels="mid-rise") for bits in (2, 3, 4, 8)),
    Int(4, 16),
    Int(6, "row"),
    Int(2, 16),
    Int(3, 64, scale_dtype="float32"),
    Int(8, 128, symmetric=True, scale_dtype="float32"),
]
X8 = MXInt(8)
GEMM = GemmLaunch(block_n=64, block_m=16, splits=2, stages=2, warps=4)
GEMV = GemvLaunch(block_n=16, block_t=2, warps=4)
# Rounding y costs 1.7e-3 in bfloat16 and an eighth of that in float16.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
TOKENS = range(1, 131) if ON_GPU else (1, 2, 17)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_dequantized_weights_equal_emulation_bit_for_bit(number_format, dtype):
    layer = build_layer(number_format, 75, 300, dtype=dtype)
    assert torch.equal(dequantize_weight(layer.packed.weight, dtype), layer.weight.dequantize(dtype))


@pytest.mark.parametrize("mid_rise", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_text_of_paired_decoding_gives_the_levels(bits, mid_rise):
    """On an emulator of the instructions: all codes in all places, each half of a word under its own scale."""
    width, offset = (4 if bits == 4 else 2), 1 << (bits - 1)
    per_word = 32 // width
    generator = torch.Generator().manual_seed(bits)
    codes_2JN = torch.randint(0, 1 << bits, (2, per_word, 1000), generator=generator)  # of the even and the odd word
    place_J1 = torch.arange(per_word)[:, None]
    words_2N = ((codes_2JN & ((1 << width) - 1)) << width * place_J1).sum(1)
    high_N = ((codes_2JN >> 2) << (place_J1 + 16 * torch.arange(2)[:, None, None])).sum((0, 1))
    scales_H = torch.tensor([2.0**-9, 2.0**7][: 2 if width == 2 else 1])
    both_H = (scales_H.to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF) * 0x10001
    inputs = [*words_2N, *both_H, *([high_N] if bits == 3 else [])]
    operands = {f"${per_word + i}": value for i, value in enumerate(inputs)}
    registers = ptx.Machine().run(pairs_asm(bits, mid_rise), operands)
    for j in range(per_word):
        for odd in range(2):
            found = (registers[f"${j}"] >> 16 * odd & 0xFFFF).to(torch.int32) << 16
            scale = scales_H[j * len(scales_H) // per_word]
            expected = (codes_2JN[odd, j] - offset + 0.5 * mid_rise) * scale
            assert torch.equal(found.view(torch.float32), expected), (j, odd)


@pytest.mark.skipif(not ON_GPU, reason="the instructions of bfloat16 decoding need a GPU")
@pytest.mark.parametrize("levels", ["mid-tread", "mid-rise"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_paired_decoding_is_exact_for_all_exponents(bits, levels):
    number_format = MXInt(bits, levels=levels)
    power = torch.arange(-118, 116).repeat_interleave(16).float()
    weight = torch.randn(64, len(power), generator=torch.Generator().manual_seed(bits)) * torch.exp2(power)
    layer = build_layer(number_format, 64, len(power))
    quantized = number_format.quantize(weight.to(DEVICE))
    packed = type(layer.packed).pack(quantized, None, None, None, None, torch.bfloat16)
    assert torch.equal(dequantize_weight(packed.weight, torch.bfloat16), quantized.dequantize(torch.bfloat16))


@pytest.mark.parametrize("activation", [None, X8, MXInt(6, 32, "floor")], ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_every_format_gives_the_formula(number_format, activation):
    layer = build_layer(number_format, 75, 300, rank=16, activation=activation, bias=True)
    x_MI = random_input(3, 300)
    exact = layer.exact(x_MI)
    for run in (lambda: run_gemm(x_MI, layer.packed, GEMM), lambda: run_dequantized(x_MI, layer.packed)):
        # The library rounds its product to the dtype before adding the branch, as emulation does.
        assert relative_error(run(), exact) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.parametrize("rank", [0, 1, 16, 32, 100, 256])
@pytest.mark.parametrize("activation", [None, X8], ids=str)
def test_every_rank_gives_the_formula(rank, activation):
    layer = build_layer(MXInt(4), 80, 272, rank=rank, activation=activation)
    for m in (1, 5):
        x_MI = random_input(m, 272)
        assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens_gives_the_formula(m):
    layer = build_layer(MXInt(4), 200, 272, rank=32, activation=X8, bias=True)
    x_MI = random_input(m, 272)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize(("n", "k"), [(16, 16), (75, 20), (64, 128), (130, 129), (320, 1000)])
def test_shapes_need_not_be_multiples_of_a_tile(n, k):
    for activation, levels in ((None, "mid-tread"), (X8, "mid-tread"), (X8, "mid-rise")):
        layer = build_layer(MXInt(4, levels=levels), n, k, rank=16, activation=activation)
        for m in (1, 4):
            x_MI = random_input(m, k)
            assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("splits", [1, 3])
def test_sums_equal_float64_to_a_millionth(splits):
    layer = build_layer(MXInt(4), 80, 1024, rank=32, activation=X8)
    x_MI = random_input(5, 1024)
    launch = GemmLaunch(64, 16, splits, 2, 4)
    assert relative_error(run_gemm(x_MI, layer.packed, launch, torch.float32), layer.exact(x_MI)) < 1e-6


def test_sums_of_the_integer_kernel_equal_float64_to_a_millionth():
    for number_format in (MXInt(4, 16), MXInt(4, 32), MXInt(4, 32, levels="mid-rise")):
        layer = build_layer(number_format, 80, 1024, rank=32, activation=X8, bias=True)
        assert fits_gemv(layer.packed)
        x_1I = random_input(1, 1024)
        for launch in (GEMV, GemvLaunch(32, 4, 4)):
            assert relative_error(run_gemv(x_1I, layer.packed, launch, torch.float32), layer.exact(x_1I)) < 1e-6


def test_small_integers_are_summed_exactly():
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randint(-7, 8, (64, 256), generator=generator).float()
    weight_OI[:, ::16] = 7.0  # every block has the exponent of 8
    x_MI = torch.randint(-127, 128, (4, 256), generator=generator).float()
    x_MI[:, ::16] = 127.0
    quantized = MXInt(4).quantize(weight_OI.to(DEVICE))
    layer = build_layer(MXInt(4), 64, 256, activation=X8)
    packed = type(layer.packed).pack(quantized, None, None, None, X8, DTYPE)
    expected = x_MI.double() @ weight_OI.double().T
    x_MI = x_MI.to(DEVICE, DTYPE)
    assert torch.equal(run_gemm(x_MI, packed, GEMM, torch.float32).double().cpu(), expected)
    assert torch.equal(run_gemv(x_MI[:1], packed, GEMV, torch.float32).double().cpu(), expected[:1])


def test_the_torch_reference_equals_the_formula():
    layer = build_layer(MXInt(4), 80, 272, rank=16, activation=X8, bias=True)
    x_MI = random_input(4, 272)
    assert relative_error(reference_linear(x_MI, layer.packed), layer.exact(x_MI)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize(
    "factor", [Passthrough("float16"), MXInt(8, 32), MXInt(4), MXInt(4, levels="mid-rise"), Int(8, 16)], ids=str
)
def test_factors_may_be_in_any_format(factor):
    layer = build_layer(MXInt(4), 80, 272, rank=32, factor=factor)
    x_MI = random_input(4, 272)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("m", [1, 4])
def test_ten_runs_give_the_same_bits_and_leave_the_counters_at_zero(m):
    layer = build_layer(MXInt(4), 200, 1024, rank=32, activation=X8)
    x_MI = random_input(m, 1024)
    first = packed_linear(x_MI, layer.packed)
    for _ in range(9 if ON_GPU else 2):
        assert torch.equal(packed_linear(x_MI, layer.packed), first)
    assert (layer.packed.workspace == 0).all()


def test_leading_dimensions_and_strides_of_x_do_not_matter():
    layer = build_layer(MXInt(4), 80, 128, rank=16, activation=X8)
    x_MI = random_input(6, 128)
    expected = packed_linear(x_MI, layer.packed)
    assert torch.equal(packed_linear(x_MI.view(2, 3, 128), layer.packed), expected.view(2, 3, 80))
    wide = torch.cat([x_MI, x_MI], dim=1)
    assert torch.equal(packed_linear(wide[:, 128:], layer.packed), expected)


def test_another_width_or_dtype_of_x_is_refused():
    layer = build_layer(MXInt(4), 80, 128)
    with pytest.raises(ValueError, match=r"x must be \(..., 128\) in torch\..*, found \(2, 64\)"):
        packed_linear(random_input(2, 64), layer.packed)
    with pytest.raises(ValueError, match=r"found .* in torch\.float32"):
        packed_linear(random_input(2, 128, torch.float32), layer.packed)


def test_decoding_inverts_encoding_of_a_spec():
    for number_format in (Int(3, 64), Int(3, 16), MXInt(3, 64), MXInt(3, 64, levels="mid-rise")):
        spec = build_layer(number_format, 80, 272, rank=16, activation=MXInt(6, 32, "floor")).packed.spec
        assert decode_spec(encode_spec(spec)) == spec


def test_the_operator_has_a_fake_implementation_and_compiles_as_one_graph():
    layer = build_layer(MXInt(4), 80, 128, rank=16, activation=X8, bias=True)
    compiled = torch.compile(lambda x: packed_linear(x * 2, layer.packed), fullgraph=True, backend="aot_eager")
    for m in (1, 3):
        x_MI = random_input(m, 128)
        assert torch.equal(compiled(x_MI), packed_linear(x_MI * 2, layer.packed))


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("m", [1, 16, 300])
def test_a_cuda_graph_replays_the_layer_on_new_inputs(m):
    layer = build_layer(MXInt(4), 200, 1024, rank=32, activation=X8)
    fresh = random_input(m, 1024).flip(0) * 3
    assert torch.equal(replayed(layer.packed, fresh), packed_linear(fresh, layer.packed))
