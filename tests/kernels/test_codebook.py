"""Codebooks: packed without loss, decoded as emulation does, multiplied as the formula says."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, DTYPES, ON_GPU, Layer, random_input, relative_error

from lqer.formats import Codebook, MXInt
from lqer.kernels import PackedLinear, packed_linear
from lqer.kernels.launch import expand, run_codebook, run_expanded
from lqer.kernels.linear import decode_spec, encode_spec
from lqer.kernels.reference import dequantize, reference_linear

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
# Indices of every width from 1 to 8 bits, groups of one row and of several, whole and cut ones, a table of low rank.
FORMATS = [
    Codebook(1, 1, 128, 64),
    Codebook(2, 1, 256),
    Codebook(3, 1, 512),
    Codebook(4, 1, 64, 128),
    Codebook(2, 1, 512, codebook_rank=2),
    Codebook(2, 2, 512, 64),
    Codebook(3, 2, 2048),
    Codebook(4, 2, 2048, 128),
    Codebook(2, 4, 4096),
]


def build(number_format: Codebook, n=37, k=192, rank=0, activation=None, bias=False, dtype=DTYPE) -> Layer:
    generator = torch.Generator().manual_seed(n + k + rank)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)

    weight = number_format.quantize(random(n, k, scale=0.05))
    a = MXInt(8).quantize(random(k, rank, scale=k**-0.5), axis=0) if rank else None
    b = MXInt(8).quantize(random(rank, n, scale=0.05), axis=0) if rank else None
    bias_N = random(n, scale=1.0) if bias else None
    return Layer(weight, a, b, bias_N, activation, PackedLinear.pack(weight, a, b, bias_N, activation, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_decoded_weights_are_those_of_emulation_bit_for_bit(number_format, dtype):
    layer = build(number_format, dtype=dtype)
    expected = layer.weight.dequantize(dtype)
    assert torch.equal(dequantize(layer.packed.weight, dtype), expected)
    assert torch.equal(expand(layer.packed.weight, dtype), expected)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_sums_are_those_of_float64_to_a_millionth(number_format):
    layer = build(number_format, bias=True)
    for m in (1, 3):
        x_MK = random_input(m, 192)
        assert relative_error(run_codebook(x_MK, layer.packed, torch.float32), layer.exact(x_MK)) < 1e-6


@pytest.mark.parametrize("activation", [None, MXInt(8)], ids=str)
@pytest.mark.parametrize("rank", [0, 16])
def test_branch_rounding_and_bias_give_the_formula(rank, activation):
    layer = build(Codebook(2, 2, 512, 64), rank=rank, activation=activation, bias=True)
    x_MK = random_input(5, 192)
    exact = layer.exact(x_MK)
    for y_MN in (
        run_codebook(x_MK, layer.packed),
        run_expanded(x_MK, layer.packed),
        reference_linear(x_MK, layer.packed),
    ):
        assert relative_error(y_MN, exact) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.parametrize("m", range(1, 131) if ON_GPU else (2, 17))
def test_every_number_of_tokens_gives_the_formula(m):
    layer = build(Codebook(2, 2, 512, 64))
    x_MK = random_input(m, 192)
    assert relative_error(packed_linear(x_MK, layer.packed), layer.exact(x_MK)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize(("n", "k"), [(1, 8), (16, 288), (70, 100), (33, 260)])
def test_shapes_need_not_be_multiples_of_a_group(n, k):
    layer = build(Codebook(2, 2, 1024), n, k)
    x_MK = random_input(2, k)
    assert relative_error(packed_linear(x_MK, layer.packed), layer.exact(x_MK)) < TOLERANCE[DTYPE]


def test_a_packed_codebook_holds_no_more_than_its_indices_and_tables():
    layer = build(Codebook(2, 2, 2048), 64, 512)
    packed = layer.packed.weight
    assert packed.words.nbytes == 64 * 512 * 2 // 8
    assert packed.table.nbytes == 64 * 512 // 2048 * 16 * 2 * DTYPE.itemsize


def test_block_scales_and_the_other_axis_are_refused():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    scaled, turned = Codebook(2, 2, 512, 64, scale_block_size=32), Codebook(2, 2, 512, 64)
    with pytest.raises(ValueError, match="scale_block_size 32: kernels read codebooks without block scales"):
        PackedLinear.pack(scaled.quantize(weight), None, None, None, None, DTYPE)
    with pytest.raises(ValueError, match="vectors must run along axis 1"):
        PackedLinear.pack(turned.quantize(weight, axis=0), None, None, None, None, DTYPE)


def test_a_spec_survives_its_way_through_a_string():
    spec = build(Codebook(3, 2, 2048), rank=16).packed.spec
    assert decode_spec(encode_spec(spec)) == spec
