"""Lattice codes with Hadamard rotations: packed without loss, dequantized as in emulation, multiplied exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, DTYPES, ON_GPU, random_input, relative_error

from lqer.formats import E8P, Int, MXInt, QuantizedTensor
from lqer.kernels import PackedLinear, TritonLinear, launch, packed_linear
from lqer.kernels.dequantize_launch import dequantize_weight
from lqer.kernels.lattice.launch import run_lattice
from lqer.kernels.layout.lattice import PackedLattice, pack_lattice
from lqer.kernels.reference import reference_linear, reference_weight
from lqer.kernels.rotations.launch import fits_hadamard
from lqer.kernels.runtime import supports_pdl
from lqer.kernels.spec import decode_spec, encode_spec
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.transforms.hadamard import RandomHadamard, hadamard, inverse_hadamard, random_hadamard

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
ROWS, TENSOR = E8P(2, block_size="row"), E8P(2)


class Layer:
    """A linear with lattice codes, unpacked and packed."""

    def __init__(self, n, k, rank=0, rotated=True, bias=False, dtype=DTYPE, number_format=TENSOR, factor=None):
        generator = torch.Generator().manual_seed(n + 3 * k + rank)

        def random(*shape: int, scale: float) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)

        factor = factor or Int(4, 32)
        self.weight = number_format.quantize(random(n, k, scale=0.05))
        self.a = factor.quantize(random(k, rank, scale=k**-0.5), axis=0) if rank else None
        self.b = factor.quantize(random(rank, n, scale=0.05), axis=0) if rank else None
        self.bias_O = random(n, scale=1.0).to(dtype) if bias else None
        self.basis = random_hadamard(n, k, seed=1).to(dtype) if rotated else None
        self.dtype = dtype
        self.packed = PackedLinear.pack(self.weight, self.a, self.b, self.bias_O, None, dtype, self.basis)

    def exact(self, x_MI: torch.Tensor) -> torch.Tensor:
        """The formula in float64, with x' and x' A rounded to the dtype of the layer, as it does."""
        x = x_MI.double()
        room = 32.0 if self.dtype == torch.float16 else 1.0
        if self.basis:
            x = hadamard(x * self.basis.input_signs_I.to(x) / room).to(self.dtype).double()
        y = x @ self.weight.dequantize().double().T
        if self.a is not None and self.b is not None:
            a, b = (part.dequantize(self.dtype).double() for part in (self.a, self.b))
            y = y + (x @ a).to(self.dtype).double() @ b
        if self.basis:
            y = inverse_hadamard(y) * self.basis.output_signs_O.to(y) * room
        return y if self.bias_O is None else y + self.bias_O.double()


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
    layer = Layer(n, k, rotated=rotated, bias=True)
    for m in (1, 3):
        x_MI = random_input(m, k)
        y_MO = run_lattice(x_MI, layer.packed, supports_pdl(x_MI), out_dtype=torch.float32)
        # x' is occasionally rounded to the dtype in the other direction.
        assert relative_error(y_MO, layer.exact(x_MI)) < (TOLERANCE[DTYPE] / 4 if rotated else 2e-5)


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("rank", [0, 10, 16, 64, 192])
def test_every_rank_gives_the_formula_with_and_without_rotations(rank, rotated):
    layer = Layer(96, 320, rank, rotated, bias=True)
    for m in (2, 17):
        x_MI = random_input(m, 320)
        exact = layer.exact(x_MI)
        assert relative_error(packed_linear(x_MI, layer.packed), exact) < 1.8 * TOLERANCE[DTYPE]
        assert relative_error(reference_linear(x_MI, layer.packed), exact) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.parametrize("m", range(1, 41) if ON_GPU else (1, 2, 5, 8, 9, 16, 20))
def test_every_number_of_tokens_gives_the_formula(m):
    layer = Layer(64, 256, rank=16)
    x_MI = random_input(m, 256)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.parametrize(("n", "k"), [(8, 8), (100, 1152), (70, 100), (33, 260), (48, 688)])
def test_shapes_need_not_be_multiples_of_a_tile_or_powers_of_two(n, k):
    layer = Layer(n, k, rank=16)
    x_MI = random_input(3, k)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


def test_torch_rotates_a_length_without_a_small_outer_factor():
    assert [fits_hadamard(length) for length in (257, 11008, 28672)] == [False, True, True]
    layer = Layer(16, 257, rank=16, bias=True)
    x_MI = random_input(2, 257)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.skipif(not ON_GPU, reason="too slow without a GPU")
@pytest.mark.parametrize(("n", "k", "rank"), [(8192, 8192, 64), (4096, 11008, 128), (11008, 4096, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_a_real_size_give_the_formula_reproducibly(n, k, rank, dtype):
    layer = Layer(n, k, rank, dtype=dtype)
    for m in (1, 4, 16):
        x_MI = random_input(m, k, dtype)
        y_MO = packed_linear(x_MI, layer.packed)
        assert relative_error(y_MO, layer.exact(x_MI)) < 1.8 * TOLERANCE[dtype]
        assert all(torch.equal(packed_linear(x_MI, layer.packed), y_MO) for _ in range(5))


def test_a_rotation_does_not_overflow_float16():
    """The rotation of this x has one element sqrt(1024) * 3000, beyond float16."""
    layer = Layer(32, 1024, dtype=torch.float16)
    assert layer.basis is not None
    x_MI = (3000 * layer.basis.input_signs_I.to(DEVICE)).unsqueeze(0)
    y_MO = packed_linear(x_MI, layer.packed)
    assert torch.isfinite(y_MO).all()
    assert relative_error(y_MO, layer.exact(x_MI)) < 1.8 * TOLERANCE[torch.float16]


def test_the_workspace_is_zero_after_a_call_and_runs_agree_bit_for_bit():
    layer = Layer(64, 1024, rank=64)
    assert layer.packed.spec.layout.tiles > layer.packed.spec.layout.span or layer.packed.spec.layout.span > 1
    x_MI = random_input(2, 1024)
    first = packed_linear(x_MI, layer.packed)
    for _ in range(3):
        assert torch.equal(packed_linear(x_MI, layer.packed), first)
        assert not layer.packed.workspace.any()


def test_activations_are_rounded_after_the_rotation():
    layer = Layer(64, 256, rank=16, factor=MXInt(8))
    packed = PackedLinear.pack(layer.weight, layer.a, layer.b, None, MXInt(8), DTYPE, layer.basis)
    parts = (part.dequantize(DTYPE) for part in (layer.a, layer.b))
    emulated = HadamardLinear(
        QuantizedLinear(layer.weight.dequantize(DTYPE), None, *parts, MXInt(8)), layer.basis, None
    )
    x_MI = random_input(3, 256)
    torch.testing.assert_close(packed_linear(x_MI, packed), emulated.to(DEVICE)(x_MI), rtol=2e-2, atol=2e-2)


def test_trained_signs_need_not_be_plus_or_minus_one():
    layer = Layer(64, 256)
    scale = torch.linspace(0.5, 1.5, 256)
    basis = RandomHadamard(layer.basis.input_signs_I * scale, layer.basis.output_signs_O * 2).to(DTYPE)
    packed = PackedLinear.pack(layer.weight, None, None, None, None, DTYPE, basis)
    emulated = HadamardLinear(QuantizedLinear(layer.weight.dequantize(DTYPE), None, None, None, None), basis, None)
    x_MI = random_input(3, 256)
    y_MO, expected = packed_linear(x_MI, packed), emulated.to(DEVICE)(x_MI)
    assert relative_error(y_MO, expected.double()) < 3 * TOLERANCE[DTYPE]


def test_the_module_rotates_and_holds_two_bits_per_weight():
    layer = Layer(128, 512, rank=16, bias=True)
    module = TritonLinear(layer.packed)
    x_MI = random_input(2, 512)
    assert torch.equal(module(x_MI), packed_linear(x_MI, layer.packed))
    assert isinstance(layer.packed.weight, PackedLattice)
    assert layer.packed.weight.units.nbytes == 128 * 512 * 2 // 8
    assert module.state_dict().keys() == dict(module.named_buffers()).keys() != set()


def test_the_operator_compiles_and_its_fake_has_the_shape():
    layer = Layer(64, 256, rank=16)
    compiled = torch.compile(lambda x: packed_linear(x * 2, layer.packed), fullgraph=True, backend="aot_eager")
    x_MI = random_input(2, 256)
    assert torch.equal(compiled(x_MI), packed_linear(x_MI * 2, layer.packed))


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_a_cuda_graph_replays_the_layer():
    layer = Layer(256, 1024, rank=64)
    static = random_input(1, 1024)
    packed_linear(static, layer.packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_MO = packed_linear(static, layer.packed)
    fresh = torch.randn_like(static)
    static.copy_(fresh)
    graph.replay()
    assert torch.equal(y_MO, packed_linear(fresh, layer.packed))


def test_decoding_inverts_encoding_of_a_spec():
    spec = Layer(64, 256, rank=16).packed.spec
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
    layer = Layer(64, 256, rank=16)
    for name in ("run_lattice", "run_lattice_halves"):
        monkeypatch.setattr(launch, name, lambda *args: pytest.fail("65 tokens are too many for the kernels"))
    x_MI = random_input(65, 256)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


def test_padded_columns_do_not_contribute():
    """x' is zero beyond the last column, whatever the codes there decode to."""
    layer = Layer(16, 100, rotated=False)
    units = torch.randint(-(2**62), 2**62, layer.packed.weight.units.shape, device=DEVICE)
    poisoned = replace(layer.packed, weight=replace(layer.packed.weight, units=units))
    x_MI = random_input(2, 100)
    expected = x_MI.double() @ reference_weight(poisoned.weight, torch.float32).double().T
    assert relative_error(packed_linear(x_MI, poisoned), expected) < TOLERANCE[DTYPE]
