"""Group-wise integers: hand-computed groups, the definition, and the ends of the scale's range."""

import pytest
import torch

from lqer.formats import Int

SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


def test_an_asymmetric_group_by_hand():
    # lo = -3, hi = 12: s = 15 / 15 = 1, z = 3
    quantized = Int(4, block_size=4).quantize(torch.tensor([[-3.0, 12.0, 0.4, 5.5]]))
    assert quantized.parts["scales"].tolist() == [[1.0]]
    assert quantized.parts["zeros"].tolist() == [[3]]
    assert quantized.parts["codes"].tolist() == [[0, 15, 3, 9]]
    assert quantized.dequantize().tolist() == [[-3.0, 12.0, 0.0, 6.0]]


def test_a_symmetric_group_by_hand():
    # s = 14 / 7 = 2
    quantized = Int(4, block_size=4, symmetric=True).quantize(torch.tensor([[-14.0, 3.0, 1.0, 8.9]]))
    assert set(quantized.parts) == {"codes", "scales"}
    assert quantized.parts["codes"].tolist() == [[-7, 2, 0, 4]]
    assert quantized.dequantize().tolist() == [[-14.0, 4.0, 0.0, 8.0]]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_range_contains_zero_even_when_the_group_does_not(sign):
    x = sign * torch.tensor([10.0, 11.0, 14.0, 15.0])
    quantized = Int(4, block_size=4).quantize(x)
    assert quantized.parts["scales"].item() == 1
    assert quantized.parts["zeros"].item() == (0 if sign == 1 else 15)
    assert torch.equal(quantized.dequantize(), x)


@pytest.mark.parametrize("scale_dtype", SMALLEST)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_follow_the_definition_with_the_scale_that_is_stored(bits, symmetric, scale_dtype):
    x = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(bits)) * 0.02
    quantized = Int(bits, 32, symmetric, scale_dtype).quantize(x.flatten(1))
    dtype = getattr(torch, scale_dtype)
    if symmetric:
        scale = (x.abs().amax(-1) / (2 ** (bits - 1) - 1)).to(dtype)
        codes = (x / scale.float().unsqueeze(-1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        values = codes * scale.float().unsqueeze(-1)
    else:
        low, high = x.amin(-1), x.amax(-1)
        scale = ((high - low) / (2**bits - 1)).to(dtype)
        zero = (-low / scale.float()).round()
        assert torch.equal(quantized.parts["zeros"].float(), zero)
        codes = ((x / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, 2**bits - 1)
        values = (codes - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)
    assert quantized.parts["scales"].dtype == dtype
    assert torch.equal(quantized.parts["scales"], scale)
    assert torch.equal(quantized.parts["codes"].float(), codes.flatten(1))
    assert torch.equal(quantized.dequantize(), values.flatten(1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_is_at_most_half_a_step_where_no_code_saturates(bits, symmetric):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    integer = Int(bits, "row", symmetric, "float32")
    quantized = integer.quantize(x)
    codes, step = quantized.parts["codes"], quantized.parts["scales"].expand(-1, 64)
    inside = (codes > integer.min_code) & (codes < integer.max_code)
    error = (quantized.dequantize() - x).abs()
    assert (error <= step * (0.5 + 1e-6))[inside].all()
    assert (error <= step * (1 + 1e-6)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", SMALLEST)
def test_a_scale_that_underflows_becomes_the_smallest_positive_number(scale_dtype, symmetric):
    x = torch.full((4,), SMALLEST[scale_dtype])
    quantized = Int(8, 4, symmetric, scale_dtype).quantize(x)
    assert quantized.parts["scales"].item() == SMALLEST[scale_dtype]
    assert torch.equal(quantized.dequantize(), x)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_scale_that_overflows_float16_saturates(symmetric):
    quantized = Int(4, 4, symmetric).quantize(torch.tensor([1e9, 0.0, 0.0, 0.0]))
    assert quantized.parts["scales"].item() == 65504
    assert quantized.dequantize()[0] == 65504 * (7 if symmetric else 15)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_floats_quantize_to_finite_values(bits, scale_dtype, symmetric):
    largest = torch.finfo(torch.float32).max
    for x in (torch.tensor([largest, 0.0]), torch.tensor([largest, -largest])):
        assert Int(bits, 2, symmetric, scale_dtype).quantize(x).dequantize().isfinite().all()
    one_sided = Int(bits, 2, symmetric, scale_dtype).quantize(torch.tensor([largest, 0.0]))
    assert one_sided.dequantize()[0] > 0.2 * largest
    assert one_sided.dequantize()[1] == 0


def test_scaling_by_a_power_of_two_scales_the_values():
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    for symmetric in (False, True):
        integer = Int(4, symmetric=symmetric, scale_dtype="bfloat16")
        assert torch.equal(integer.fake_quantize(x * 2.0**40), integer.fake_quantize(x) * 2.0**40)


def test_zero_points_are_packed_at_the_width_of_the_codes():
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(4))
    packed = Int(2, block_size=16).quantize(x).pack()
    assert packed["zeros"].shape == (8, 2)
    assert packed["codes"].shape == (8, 32)
    assert packed["scales"].shape == (8, 8)
