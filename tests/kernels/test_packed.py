"""Layers with lattice or trellis codes in a rotated basis: what holds for both."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, random_input, relative_error, replayed
from rotated_layer import lattice_layer, trellis_layer

from lqer.formats import MXInt, Trellis
from lqer.kernels import PackedLinear, packed_linear
from lqer.kernels.reference import reference_linear
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.transforms.hadamard import RandomHadamard

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
CODES = {
    "lattice": lattice_layer,
    "trellis": trellis_layer,
    "trellis-bytes": partial(trellis_layer, number_format=Trellis(2, table="bytes")),
}


@pytest.fixture(params=CODES)
def layer_of(request):
    """Makes a layer of a shape, (out_features, in_features)."""
    return CODES[request.param]


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("rank", [0, 10, 16, 64, 192])
def test_every_rank_gives_the_formula_with_and_without_rotations(layer_of, rank, rotated):
    layer = layer_of(96, 320, rank, rotated=rotated, bias=True)
    for m in (2, 17):
        x_MI = random_input(m, 320)
        exact = layer.exact(x_MI)
        assert relative_error(packed_linear(x_MI, layer.packed), exact) < 1.8 * TOLERANCE[DTYPE]
        assert relative_error(reference_linear(x_MI, layer.packed), exact) < 1.8 * TOLERANCE[DTYPE]


def test_activations_are_rounded_after_the_rotation(layer_of):
    layer = layer_of(64, 256, rank=16, factor=MXInt(8))
    packed = PackedLinear.pack(layer.weight, layer.a, layer.b, None, MXInt(8), DTYPE, layer.basis)
    parts = (part.dequantize(DTYPE) for part in (layer.a, layer.b))
    emulated = HadamardLinear(
        QuantizedLinear(layer.weight.dequantize(DTYPE), None, *parts, MXInt(8)), layer.basis, None
    )
    x_MI = random_input(3, 256)
    torch.testing.assert_close(packed_linear(x_MI, packed), emulated.to(DEVICE)(x_MI), rtol=2e-2, atol=2e-2)


def test_trained_signs_need_not_be_plus_or_minus_one(layer_of):
    layer = layer_of(64, 256)
    scale = torch.linspace(0.5, 1.5, 256)
    basis = RandomHadamard(layer.basis.input_signs_I * scale, layer.basis.output_signs_O * 2).to(DTYPE)
    packed = PackedLinear.pack(layer.weight, None, None, None, None, DTYPE, basis)
    emulated = HadamardLinear(QuantizedLinear(layer.weight.dequantize(DTYPE), None, None, None, None), basis, None)
    x_MI = random_input(3, 256)
    y_MO, expected = packed_linear(x_MI, packed), emulated.to(DEVICE)(x_MI)
    assert relative_error(y_MO, expected.double()) < 3 * TOLERANCE[DTYPE]


def test_the_operator_compiles_and_its_fake_has_the_shape(layer_of):
    layer = layer_of(64, 256, rank=16)
    compiled = torch.compile(lambda x: packed_linear(x * 2, layer.packed), fullgraph=True, backend="aot_eager")
    x_MI = random_input(2, 256)
    assert torch.equal(compiled(x_MI), packed_linear(x_MI * 2, layer.packed))


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_a_cuda_graph_replays_the_layer(layer_of):
    layer = layer_of(256, 1024, rank=64)
    fresh = random_input(1, 1024) * 3
    assert torch.equal(replayed(layer.packed, fresh), packed_linear(fresh, layer.packed))
