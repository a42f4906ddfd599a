"""OCP MX against microxcaling's outputs, PyTorch's own 8-bit floats, and a search over all element values."""

import json
import struct
from pathlib import Path

import pytest
import torch

from lqer.formats import MX, MXInt

BLOCKS = {b["name"]: b for b in json.loads((Path(__file__).parent / "mx_vectors.json").read_text())["blocks"]}
ELEMENTS = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1", "mxint8"]


def tensor(digits: str) -> torch.Tensor:
    return torch.tensor(struct.unpack(">16f", bytes.fromhex(digits)))


def one_scale() -> dict[str, torch.Tensor]:
    """A block whose shared scale is 1."""
    return {"exponents": torch.tensor([127], dtype=torch.uint8)}


def element_values(element: str) -> torch.Tensor:
    """The value of every bit pattern of the element, decoded with a shared scale of 1."""
    mx = MX(element)
    codes = torch.arange(1 << mx.stream_widths["codes"], dtype=torch.int32).to(torch.uint8)
    return mx.decode(codes.unsqueeze(0), one_scale())[0]


@pytest.mark.parametrize("rounding", ["even", "away"])
@pytest.mark.parametrize("name", BLOCKS)
def test_values_equal_microxcaling(name, rounding):
    x = tensor(BLOCKS[name]["input"])
    for element in ELEMENTS:
        expected = tensor(BLOCKS[name][rounding][element])
        mx = MX(element, block_size=16, element_rounding=rounding)
        assert torch.equal(mx.quantize(x).dequantize(), expected), element
        assert torch.equal(mx.fake_quantize(x), expected), element


@pytest.mark.parametrize(("element", "dtype"), [("mxfp8_e4m3", torch.float8_e4m3fn), ("mxfp8_e5m2", torch.float8_e5m2)])
def test_8_bit_floats_are_those_of_pytorch(element, dtype):
    patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = patterns.view(dtype).float()
    assert torch.equal(element_values(element).nan_to_num(nan=-1), values.nan_to_num(nan=-1))
    largest = values[values.isfinite()].max()
    x = torch.linspace(-1, 1, 4001) ** 5 * largest
    codes = MX(element).encode(x.unsqueeze(0), one_scale())[0]
    assert torch.equal(codes, x.to(dtype).view(torch.uint8))


def test_small_floats_have_the_values_of_the_specification():
    assert element_values("mxfp4_e2m1").tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    e2m3 = element_values("mxfp6_e2m3")[:32]
    assert e2m3[[1, 7, 8, 15, 16, 31]].tolist() == [0.125, 0.875, 1, 1.875, 2, 7.5]
    e3m2 = element_values("mxfp6_e3m2")[:32]
    assert e3m2[[1, 3, 4, 7, 8, 31]].tolist() == [0.0625, 0.1875, 0.25, 0.4375, 0.5, 28]


def test_mxint8_is_twos_complement_in_units_of_a_64th():
    values = element_values("mxint8")
    assert values[[0, 1, 64, 127, 128, 192, 255]].tolist() == [0, 1 / 64, 1, 127 / 64, -2, -1, -1 / 64]


def test_mxint8_is_mxint_with_floor_outside_subnormal_blocks():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-37, 37, 64).unsqueeze(-1)
    x[::5, ::32] = 2.0 ** torch.arange(-126, -126 + 13).unsqueeze(-1)
    mxint = MXInt(8, block_size=32, scale_rounding="floor")
    assert torch.equal(MX("mxint8").fake_quantize(x), mxint.fake_quantize(x))


@pytest.mark.parametrize("rounding", ["even", "away"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_encoding_takes_the_nearest_element_value(element, rounding):
    mx = MX(element, element_rounding=rounding)
    values = element_values(element)
    values = values[values.isfinite() & ~values.signbit()]  # ascending, as their codes are
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    low_is_even = torch.arange(len(low)) % 2 == 0
    tie = high if rounding == "away" else torch.where(low_is_even, low, high)
    x = torch.cat([values, middle * (1 - 2**-20), middle, middle * (1 + 2**-20), values[-1:] * 1.1])
    expected = torch.cat([values, low, tie, high, values[-1:]])
    for sign in (1, -1):
        codes = mx.encode(sign * x.unsqueeze(0), one_scale())
        assert torch.equal(mx.decode(codes, one_scale())[0], sign * expected)


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_finite_pattern_encodes_back_under_every_scale_that_keeps_it_finite(element):
    mx = MX(element)
    codes = torch.arange(1 << mx.stream_widths["codes"], dtype=torch.int32).to(torch.uint8)
    codes = codes[element_values(element).isfinite()]
    if element == "mxint8":
        codes = codes[codes != 128]  # -2, which encoding never uses
    exponents = torch.arange(0, 255 - 16, dtype=torch.int32).to(torch.uint8)
    values = mx.decode(codes.expand(len(exponents), -1), {"exponents": exponents})
    scale = 2.0 ** (exponents.double() - 127).unsqueeze(-1)
    assert torch.equal(values.double(), mx.decode(codes.unsqueeze(0), one_scale()).double() * scale)
    assert torch.equal(mx.encode(values, {"exponents": exponents}), codes.expand(len(exponents), -1))


@pytest.mark.parametrize("element", ELEMENTS)
def test_finite_input_gives_finite_values_at_both_ends_of_float32(element):
    limits = torch.finfo(torch.float32)
    x = torch.tensor([[limits.max, -limits.max, 1.0, 0.0], [2.0**-149, -(2.0**-140), 2.0**-126, 0.0]])
    values = MX(element, block_size=4).quantize(x).dequantize()
    assert values.isfinite().all()
    assert values[0, 0] > 0.7 * limits.max
    assert values[1, 2] == 2.0**-126


def test_exponent_255_decodes_to_nan():
    scales = {"exponents": torch.tensor([255], dtype=torch.uint8)}
    assert MX("mxfp4_e2m1").decode(torch.arange(16, dtype=torch.uint8).unsqueeze(0), scales).isnan().all()


def test_the_maximum_saturates_between_the_largest_element_and_the_next_power_of_two():
    x = torch.tensor([7.9, 7.0, 5.1, 1.0])
    assert MX("mxfp4_e2m1", block_size=4).fake_quantize(x).tolist() == [6, 6, 6, 1]


def test_away_and_even_part_at_ties_only():
    x = torch.tensor([4.0, 2.5, 1.25, 0.25, -0.75])
    assert MX("mxfp4_e2m1").fake_quantize(x).tolist() == [4, 2, 1, 0, -1]
    assert MX("mxfp4_e2m1", element_rounding="away").fake_quantize(x).tolist() == [4, 3, 1.5, 0.5, -1]
