"""Packing for the kernels: codes and scales are preserved, padding is zero, unsupported formats are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lqer.formats import MX, Int, MXInt, Passthrough, QuantizedTensor
from lqer.kernels import PackedLinear, pack_weight, unpack_codes
from lqer.kernels.reference import reference_weight

FORMATS = [
    *(MXInt(bits, block) for bits in range(2, 9) for block in (16, 32)),
    *(Int(bits, 16) for bits in range(2, 9)),
    Int(4, 128),
    Int(4, "row"),
    Int(3, 64, symmetric=True),
    Int(8, 128, symmetric=True, scale_dtype="bfloat16"),
    MXInt(4, "row"),
    MXInt(4, 16, "floor"),
    MXInt(2, 1024),
    *(MXInt(bits, 16, levels="mid-rise") for bits in (2, 3, 4, 8)),
]


def random_weight(number_format, n: int = 75, k: int = 200) -> QuantizedTensor:
    return number_format.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)))


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_codes_and_values_are_preserved(number_format):
    weight = random_weight(number_format)
    packed = pack_weight(weight)
    assert torch.equal(unpack_codes(packed).to(torch.int64), weight.parts["codes"].to(torch.int64))
    assert torch.equal(reference_weight(packed, torch.float32), weight.dequantize())


@pytest.mark.parametrize("levels", ["mid-tread", "mid-rise"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_codes_with_all_exponents_are_preserved(bits, levels):
    number_format = MXInt(bits, 16, levels=levels)
    smallest, largest = number_format.min_code, number_format.max_code
    codes = (torch.arange(16) % (largest - smallest + 1) + smallest).to(torch.int8).repeat(256, 1)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None]
    # Steps below 2^-126 or above 2^119 are refused; exponent 0 is a block of zeros.
    usable = (exponents[:, 0] == 0) | (
        (exponents[:, 0] > number_format.fraction_bits) & (exponents[:, 0] <= 246 + number_format.fraction_bits)
    )
    codes = torch.where(exponents == 0, 0, codes)[usable].to(torch.int8)
    weight = QuantizedTensor(number_format, codes.shape, 1, {"codes": codes, "exponents": exponents[usable]})
    packed = pack_weight(weight)
    assert torch.equal(unpack_codes(packed).to(torch.int8), codes)
    assert torch.equal(reference_weight(packed, torch.float32), weight.dequantize())
    assert torch.equal(reference_weight(packed, torch.bfloat16), weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize(("exponent", "shown"), [(2, "-128"), (251, "121")])
def test_a_step_outside_the_exact_range_is_refused(exponent, shown):
    codes = torch.ones(1, 16, dtype=torch.int8)
    parts = {"codes": codes, "exponents": torch.tensor([[exponent]], dtype=torch.uint8)}
    weight = QuantizedTensor(MXInt(4), (1, 16), 1, parts)
    with pytest.raises(ValueError, match=rf"the step 2\^{shown} of an MXINT block is outside 2\^-126..2\^119"):
        pack_weight(weight)


def test_a_packed_weight_has_the_bits_of_its_format():
    weight = random_weight(MXInt(4), 1024, 1024)
    assert 8 * pack_weight(weight).nbytes == 4.5 * 1024 * 1024
    weight = random_weight(MXInt(3), 1024, 1024)
    assert 8 * pack_weight(weight).nbytes == 3.5 * 1024 * 1024


def test_padding_holds_zeros():
    packed = pack_weight(random_weight(MXInt(4), 3, 20))
    assert packed.layout.padded_rows == 64
    whole = dataclasses.replace(
        packed, layout=dataclasses.replace(packed.layout, rows=64, columns=packed.layout.tile_k)
    )
    values = reference_weight(whole, torch.float32)
    assert (values[3:] == 0).all()
    assert (values[:, 32:] == 0).all()


@pytest.mark.parametrize(
    ("number_format", "rule"),
    [
        (
            MX("mxfp4_e2m1"),
            'kernels support weights of kind "mxint", "int", "codebook", "e8p" and "trellis", found "mx"',
        ),
        (Passthrough("float16"), 'found "passthrough"'),
        (Int(4, 96), 'block_size 96 is neither "row" nor a power of two of at least 16'),
        (MXInt(4, 8), "block_size 8 is neither"),
    ],
)
def test_an_unsupported_format_is_refused_with_the_rule(number_format, rule):
    with pytest.raises(ValueError, match=rule):
        pack_weight(random_weight(number_format))


def test_blocks_along_axis_0_are_refused():
    with pytest.raises(ValueError, match="blocks must be along axis 1"):
        pack_weight(MXInt(4).quantize(torch.randn(32, 32), axis=0))


@pytest.mark.parametrize(
    ("activation", "dtype", "rule"),
    [
        (Int(8), torch.float16, 'kernels round activations to "mxint"'),
        (MXInt(8, levels="mid-rise"), torch.float16, 'kernels round activations to "mxint" with mid-tread levels'),
        (MXInt(8, 48), torch.float16, r"activation block_size 48 is not one of \(16, 32, 64\)"),
        (None, torch.float32, "kernels compute in bfloat16 or float16, found torch.float32"),
    ],
)
def test_unsupported_activations_and_dtypes_are_refused(activation, dtype, rule):
    with pytest.raises(ValueError, match=rule):
        PackedLinear.pack(random_weight(MXInt(4)), None, None, None, activation, dtype)
