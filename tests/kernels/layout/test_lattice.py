"""Lattice codes with Hadamard rotations: packed without loss, dequantized as in emulation, multiplied exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, DTYPES, ON_GPU, random_input, relative_error
from rotated_layer import lattice_layer

from lqer.formats import E8P, MXInt, QuantizedTensor
from lqer.kernels import PackedLinear, TritonLinear, launch, packed_linear
from lqer.kernels.dequantize_launch import dequantize_weight
from lqer.kernels.lattice.launch import run_lattice
from lqer.kernels.layout.lattice import PackedLattice, pack_lattice
from lqer.kernels.reference import reference_weight
from lqer.kernels.rotations.launch import fits_hadamard
from lqer.kernels.runtime import supports_pdl
from lqer.kernels.spec import decode_spec, encode_spec
from lqer.transforms.hadamard import RandomHadamard, random_hadamard

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
ROWS, TENSOR = E8P(2, block_size="row"), E8P(2)


def all_codes(number_format: E8P = TENSOR) -> QuantizedTensor:
    """Every one of the 65536 codes once: 512 rows of 128 codes."""
    scale = torch.tensor([[0.75]]) if number_format.block_size == "tensor" else torch.linspace(0.5, 2, 512)[:, None]
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    parts = {"codes": order.view(512, 128).to(DEVICE), "scales": scale.to(DEVICE)}
    return QuantizedTensor(number_format, (512, 1024), 1, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", [TENSOR, ROWS], ids=["one scale", "a scale per row"])
def test_every_code_dequantizes_as_in_emulation_bit_for_bit(number_format, dtype):
    weight = all_codes(number_format)
    packed, expected = pack_lattice(weight), weight.dequantize(dtype)
    assert torch.equal(reference_weight(packed, dtype), expected)
    assert torch.equal(dequantize_weight(packed, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_exact_for_every_code(dtype):
    """A token that is one in one column: y is that column of the weight, exactly."""
    weight = all_codes()
    packed = PackedLinear.pack(weight, None, None, None, None, dtype)
    points_OI = weight.dequantize()
    columns = torch.arange(0, 1024, 1 if ON_GPU else 37)
    for some in columns.split(4):
        x_MI = torch.zeros(len(some), 1024, dtype=dtype, device=DEVICE)
        x_MI[torch.arange(len(some)), some] = 1
        y_MO = run_lattice(x_MI, packed, supports_pdl(x_MI), out_dtype=torch.float32)
        assert torch.equal(y_MO, points_OI[:, some].T)


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (80, 384), (24, 160)])
def test_sums_equal_float64_to_fifteen_bits_of_a_tile_s_largest_value(n, k, rotated):
    layer = lattice_layer(n, k, rotated=rotated, bias=True)
    for m in (1, 3):
        x_MI = random_input(m, k)
        y_MO = run_lattice(x_MI, layer.packed, supports_pdl(x_MI), out_dtype=torch.float32)
        # x' is occasionally rounded to the dtype in the other direction.
        assert relative_error(y_MO, layer.exact(x_MI)) < (TOLERANCE[DTYPE] / 4 if rotated else 2e-5)


@pytest.mark.parametrize("m", range(1, 41) if ON_GPU else (1, 2, 5, 8, 9, 16, 20))
def test_every_number_of_tokens_gives_the_formula(m):
    layer = lattice_layer(64, 256, rank=16)
    x_MI = random_input(m, 256)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.parametrize(("n", "k"), [(8, 8), (100, 1152), (70, 100), (33, 260), (48, 688)])
def test_shapes_need_not_be_multiples_of_a_tile_or_powers_of_two(n, k):
    layer = lattice_layer(n, k, rank=16)
    x_MI = random_input(3, k)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


def test_torch_rotates_a_length_without_a_small_outer_factor():
    assert [fits_hadamard(length) for length in (257, 11008, 28672)] == [False, True, True]
    layer = lattice_layer(16, 257, rank=16, bias=True)
    x_MI = random_input(2, 257)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.skipif(not ON_GPU, reason="too slow without a GPU")
@pytest.mark.parametrize(("n", "k", "rank"), [(8192, 8192, 64), (4096, 11008, 128), (11008, 4096, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_a_real_size_give_the_formula_reproducibly(n, k, rank, dtype):
    layer = lattice_layer(n, k, rank, dtype=dtype)
    for m in (1, 4, 16):
        x_MI = random_input(m, k, dtype)
        y_MO = packed_linear(x_MI, layer.packed)
        assert relative_error(y_MO, layer.exact(x_MI)) < 1.8 * TOLERANCE[dtype]
        assert all(torch.equal(packed_linear(x_MI, layer.packed), y_MO) for _ in range(5))


def test_a_rotation_does_not_overflow_float16():
    """The rotation of this x has one element sqrt(1024) * 3000, beyond float16."""
    layer = lattice_layer(32, 1024, dtype=torch.float16)
    assert layer.basis is not None
    x_MI = (3000 * layer.basis.input_signs_I.to(DEVICE)).unsqueeze(0)
    y_MO = packed_linear(x_MI, layer.packed)
    assert torch.isfinite(y_MO).all()
    assert relative_error(y_MO, layer.exact(x_MI)) < 1.8 * TOLERANCE[torch.float16]


def test_the_workspace_is_zero_after_a_call_and_runs_agree_bit_for_bit():
    layer = lattice_layer(64, 1024, rank=64)
    assert layer.packed.spec.layout.tiles > layer.packed.spec.layout.span or layer.packed.spec.layout.span > 1
    x_MI = random_input(2, 1024)
    first = packed_linear(x_MI, layer.packed)
    for _ in range(3):
        assert torch.equal(packed_linear(x_MI, layer.packed), first)
        assert not layer.packed.workspace.any()


def test_the_module_rotates_and_holds_two_bits_per_weight():
    layer = lattice_layer(128, 512, rank=16, bias=True)
    module = TritonLinear(layer.packed)
    x_MI = random_input(2, 512)
    assert torch.equal(module(x_MI), packed_linear(x_MI, layer.packed))
    assert isinstance(layer.packed.weight, PackedLattice)
    assert layer.packed.weight.units.nbytes == 128 * 512 * 2 // 8
    assert module.state_dict().keys() == dict(module.named_buffers()).keys() != set()


def test_decoding_inverts_encoding_of_a_spec():
    spec = lattice_layer(64, 256, rank=16).packed.spec
    assert decode_spec(encode_spec(spec)) == spec


def test_residual_codes_block_scales_and_vectors_along_axis_0_are_refused():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))

    def pack(weight: QuantizedTensor, basis: RandomHadamard | None = None) -> PackedLinear:
        return PackedLinear.pack(weight, None, None, None, None, DTYPE, basis)

    for bits in (3, 4):
        with pytest.raises(ValueError, match=f"bits {bits}: kernels support lattice codes of 2 bits"):
            pack(E8P(bits).quantize(weight))
    with pytest.raises(ValueError, match="block_size 32: kernels support one scale per row or per tensor"):
        pack(E8P(2, 32).quantize(weight))
    with pytest.raises(ValueError, match="vectors must be along axis 1"):
        pack(TENSOR.quantize(weight, axis=0))
    with pytest.raises(
        ValueError, match='kernels rotate x and y for weights of kind "e8p" and "trellis" only, found "mxint"'
    ):
        pack(MXInt(4).quantize(weight), random_hadamard(32, 64, seed=0))


def test_more_tokens_than_the_kernels_support_are_multiplied_by_a_library(monkeypatch):
    layer = lattice_layer(64, 256, rank=16)
    for name in ("run_lattice", "run_lattice_halves"):
        monkeypatch.setattr(launch, name, lambda *args: pytest.fail("65 tokens are too many for the kernels"))
    x_MI = random_input(65, 256)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


def test_padded_columns_do_not_contribute():
    """x' is zero beyond the last column, whatever the codes there decode to."""
    layer = lattice_layer(16, 100, rotated=False)
    units = torch.randint(-(2**62), 2**62, layer.packed.weight.units.shape, device=DEVICE)
    poisoned = replace(layer.packed, weight=replace(layer.packed.weight, units=units))
    x_MI = random_input(2, 100)
    expected = x_MI.double() @ reference_weight(poisoned.weight, torch.float32).double().T
    assert relative_error(packed_linear(x_MI, poisoned), expected) < TOLERANCE[DTYPE]
