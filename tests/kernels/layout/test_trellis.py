"""Trellis codes with Hadamard rotations: packed without loss, dequantized as in emulation, multiplied in float32."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, DTYPES, ON_GPU, random_input, random_trellis, relative_error
from rotated_layer import trellis_layer

from lqer.formats import QuantizedTensor, Trellis
from lqer.formats.trellis import TABLES
from lqer.kernels import PackedLinear, TritonLinear, launch, packed_linear
from lqer.kernels.dequantize_launch import dequantize_weight
from lqer.kernels.layout.trellis import PackedTrellis, TrellisLayout, pack_trellis
from lqer.kernels.reference import reference_weight
from lqer.kernels.runtime import supports_pdl
from lqer.kernels.spec import decode_spec, encode_spec
from lqer.kernels.trellis.launch import TrellisLaunch, best_launch, run_trellis
from lqer.kernels.trellis.resident_launch import ResidentLaunch, run_resident

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
FORMATS = [
    Trellis(bits, state_bits, table)
    for bits in (1, 2, 3, 4)
    for state_bits, table in itertools.product((12, 16), TABLES)
]
REAL_FORMATS = [
    *(Trellis(bits, table=table) for bits in (2, 3, 4) for table in ("gaussian", "bytes")), Trellis(2, 16),
    Trellis(4, 14), Trellis(3, 16, "bytes"),
]  # fmt: skip
BY_TABLE = pytest.mark.parametrize("table", ["gaussian", "bytes"])
BY_NAME = pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f"{f.bits}-{f.state_bits}-{f.table}")


def run_few(x_MI, packed, *launched, **options):
    """The product by the kernels for few tokens."""
    run = run_resident if packed.spec.layout.sums_bytes else run_trellis
    return run(x_MI, packed, supports_pdl(x_MI), *launched, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BY_NAME
def test_every_format_dequantizes_as_in_emulation_bit_for_bit(number_format, dtype):
    """Random codes: at 256 rows by 512 columns nearly all of the 2^16 states occur."""
    weight = random_trellis(number_format, 256, 512)
    packed, expected = pack_trellis(weight), weight.dequantize(dtype)
    assert torch.equal(reference_weight(packed, dtype), expected)
    assert torch.equal(dequantize_weight(packed, dtype), expected)


@BY_NAME
def test_the_product_is_exact_for_every_format(number_format):
    """A token that is one in one column: y is that column of the weight, exactly."""
    weight = random_trellis(number_format, 64, 512, scale=0.75)
    packed = PackedLinear.pack(weight, None, None, None, None, DTYPE)
    values_OI = weight.dequantize()
    columns = torch.arange(0, 512, 1 if ON_GPU else 61)
    for some in columns.split(4 if number_format.table == "bytes" else 16):
        x_MI = torch.zeros(len(some), 512, dtype=DTYPE, device=DEVICE)
        x_MI[torch.arange(len(some)), some] = 1
        y_MO = run_few(x_MI, packed, out_dtype=torch.float32)
        assert torch.equal(y_MO, values_OI[:, some].T)


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@BY_TABLE
@pytest.mark.parametrize(("n", "k"), [(64, 256), (80, 384), (32, 160)])
def test_sums_equal_float64_to_the_precision_of_float32(n, k, table, rotated):
    layer = trellis_layer(n, k, rotated=rotated, bias=True, number_format=Trellis(2, table=table))
    for m in (1, 3) if table == "bytes" else (1, 3, 9):
        x_MI = random_input(m, k)
        y_MO = run_few(x_MI, layer.packed, out_dtype=torch.float32)
        # x' is occasionally rounded to the dtype in the other direction.
        assert relative_error(y_MO, layer.exact(x_MI)) < (TOLERANCE[DTYPE] / 4 if rotated else 2e-5)


@BY_TABLE
@pytest.mark.parametrize("m", (*range(1, 41), 63, 64, 65) if ON_GPU else (1, 2, 7, 8, 9, 16, 17))
def test_every_number_of_tokens_gives_the_formula(m, table):
    layer = trellis_layer(64, 256, rank=16, number_format=Trellis(2, table=table))
    x_MI = random_input(m, 256)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


@BY_TABLE
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (112, 1152), (48, 688)])
def test_shapes_are_multiples_of_16_and_need_not_be_multiples_of_a_tile(n, k, bits, table):
    layer = trellis_layer(n, k, rank=16, number_format=Trellis(bits, table=table))
    x_MI = random_input(3, k)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.skipif(not ON_GPU, reason="too slow without a GPU")
@pytest.mark.parametrize("number_format", REAL_FORMATS)
@pytest.mark.parametrize(("n", "k", "rank"), [(8192, 8192, 64), (4096, 11008, 128), (11008, 4096, 0)])
def test_layers_of_a_real_size_give_the_formula_reproducibly(n, k, rank, number_format):
    layer = trellis_layer(n, k, rank, number_format=number_format)
    for m in (1, 4, 16):
        x_MI = random_input(m, k)
        y_MO = packed_linear(x_MI, layer.packed)
        assert relative_error(y_MO, layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]
        assert all(torch.equal(packed_linear(x_MI, layer.packed), y_MO) for _ in range(5))


@pytest.mark.parametrize(
    "launched",
    [
        TrellisLaunch(2, 1), TrellisLaunch(2, 4), TrellisLaunch(16, 16),
        ResidentLaunch(1, 1, 1), ResidentLaunch(1, 2, 4), ResidentLaunch(2, 3, 3),
    ],
    ids=str,
)  # fmt: skip
def test_every_launch_gives_the_same_layer(launched):
    table = "bytes" if isinstance(launched, ResidentLaunch) else "gaussian"
    layer = trellis_layer(64, 1024, rank=32, bias=True, number_format=Trellis(2, table=table))
    x_MI = random_input(3, 1024)
    y_MO = run_few(x_MI, layer.packed, launched)
    assert relative_error(y_MO, layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


def test_programs_fill_the_gpu_in_as_few_turns_as_possible():
    spans = {(8192, 8192): 16, (11008, 4096): 16, (4096, 4096): 4, (576, 576): 1}
    for (n, k), span in spans.items():
        assert best_launch(TrellisLayout(n, k, 2, 12, 0), 132) == TrellisLaunch(16, span)


@BY_TABLE
def test_a_token_with_large_and_small_elements_keeps_both(table):
    """A step for each 128 columns: columns of the second tile are 2^-24 of those of the first."""
    weight = random_trellis(Trellis(2, table=table), 32, 256, scale=1.0)
    packed = PackedLinear.pack(weight, None, None, None, None, torch.float16)
    x_MI = torch.zeros(1, 256, dtype=torch.float16, device=DEVICE)
    x_MI[0, 130], x_MI[0, 5] = 2.0**-20, 60000.0
    y_MO = run_few(x_MI, packed, out_dtype=torch.float32)
    values_OI = weight.dequantize().double()
    expected = values_OI[:, 5] * 60000 + values_OI[:, 130] * 2.0**-20
    torch.testing.assert_close(y_MO[0].double(), expected, rtol=1e-6, atol=0)
    x_MI[0, 5] = 0
    y_MO = run_few(x_MI, packed, out_dtype=torch.float32)
    assert torch.equal(y_MO[0].double(), values_OI[:, 130] * 2.0**-20)


@BY_TABLE
def test_a_token_that_is_not_finite_gives_no_finite_output(table):
    layer = trellis_layer(32, 256, rotated=False, number_format=Trellis(2, table=table))
    for value in (float("inf"), float("nan")):
        x_MI = random_input(2, 256)
        x_MI[1, 7] = value
        y_MO = packed_linear(x_MI, layer.packed)
        assert torch.isfinite(y_MO[0]).all()
        assert not torch.isfinite(y_MO[1]).any()


@BY_TABLE
def test_the_workspace_is_zero_after_a_call_and_runs_agree_bit_for_bit(table):
    layer = trellis_layer(64, 2048, rank=64, number_format=Trellis(2, table=table))
    x_MI = random_input(2, 2048)
    first = packed_linear(x_MI, layer.packed)
    for _ in range(3):
        assert torch.equal(packed_linear(x_MI, layer.packed), first)
        assert not layer.packed.workspace.any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_module_rotates_and_holds_the_bits_of_the_codes(bits):
    layer = trellis_layer(128, 512, rank=16, bias=True, number_format=Trellis(bits))
    module = TritonLinear(layer.packed)
    x_MI = random_input(2, 512)
    assert torch.equal(module(x_MI), packed_linear(x_MI, layer.packed))
    assert isinstance(layer.packed.weight, PackedTrellis)
    scales = 128 * 4  # one for each row, because linears side by side have scales of their own
    assert layer.packed.weight.nbytes == 128 * 512 * bits // 8 + scales
    assert module.state_dict().keys() == dict(module.named_buffers()).keys() != set()


@BY_NAME
def test_decoding_inverts_encoding_of_a_spec(number_format):
    spec = trellis_layer(64, 256, rank=16, number_format=number_format).packed.spec
    assert decode_spec(encode_spec(spec)) == spec


def test_a_weight_along_axis_0_is_refused():
    weight = random_trellis(Trellis(2), 32, 64)
    turned = QuantizedTensor(weight.format, (64, 32), 0, weight.parts)
    with pytest.raises(ValueError, match="rows must be along axis 1 of a matrix, found axis 0"):
        PackedLinear.pack(turned, None, None, None, None, DTYPE)


def test_more_tokens_than_the_kernels_support_are_multiplied_by_a_library(monkeypatch):
    layer = trellis_layer(64, 256, rank=16)
    monkeypatch.setattr(launch, "run_trellis", lambda *args: pytest.fail("65 tokens are too many for the kernels"))
    x_MI = random_input(65, 256)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 1.8 * TOLERANCE[DTYPE]


@BY_TABLE
def test_padded_columns_do_not_contribute(table):
    """x' is zero beyond the last column, whatever the codes there decode to."""
    layer = trellis_layer(16, 112, rotated=False, number_format=Trellis(2, table=table))
    words = torch.randint(-(2**31), 2**31, layer.packed.weight.words.shape, dtype=torch.int32, device=DEVICE)
    poisoned = replace(layer.packed, weight=replace(layer.packed.weight, words=words))
    x_MI = random_input(2, 112)
    expected = x_MI.double() @ reference_weight(poisoned.weight, torch.float32).double().T
    assert relative_error(packed_linear(x_MI, poisoned), expected) < TOLERANCE[DTYPE]
