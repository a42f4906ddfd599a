from __future__ import annotations

import pytest
import torch

from lqer.formats import MX, Int, MXInt
from lqer.transforms.block_statistics import block_products
from lqer.transforms.clip import (
    SHRINK_FACTORS,
    group_range,
    quantize_clipped,
    search_clipping,
)

FORMATS = [
    Int(bits=3, block_size=16),
    Int(bits=4, block_size=16, symmetric=True),
    Int(bits=2, block_size="row"),
    MXInt(bits=4, block_size=16),
]


@pytest.fixture(scope="module")
def weight_OI():
    weight = torch.randn(12, 72, generator=torch.Generator().manual_seed(0))
    weight[3, 16:32] = 0
    weight[5, 7] = 9
    return weight


@pytest.fixture(scope="module")
def x_TI():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(300, 72, generator=generator) @ torch.randn(72, 72, generator=generator)


@pytest.mark.parametrize("number_format", [*FORMATS, MX(element="mxfp4_e2m1")], ids=str)
def test_a_factor_of_one_is_plain_rounding(weight_OI, number_format):
    ones_ON = torch.ones_like(group_range(weight_OI, number_format)[0])
    clipped, plain = quantize_clipped(weight_OI, number_format, ones_ON, ones_ON), number_format.quantize(weight_OI)
    assert clipped.parts.keys() == plain.parts.keys()
    assert all(torch.equal(clipped.parts[name], plain.parts[name]) for name in plain.parts)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_the_error_of_every_group_is_the_smallest_on_the_grid(weight_OI, x_TI, number_format):
    found_ON = search_clipping(weight_OI, block_products(x_TI, number_format.block_size), number_format)
    width = 72 if number_format.block_size == "row" else 16
    for row in (0, 3, 5):
        for n, columns in enumerate(torch.arange(72).split(width)):
            # By the definition: partial products of all tokens, one factor after the other.
            w_B, x_TB = weight_OI[row, columns], x_TI[:, columns]
            errors = []
            for factor in SHRINK_FACTORS:
                factors_11 = torch.full((1, 1), factor)
                rounded_B = quantize_clipped(w_B[None], number_format, factors_11, factors_11).dequantize()[0]
                errors.append(float((x_TB @ w_B - x_TB @ rounded_B).square().mean()))
            chosen = SHRINK_FACTORS.index(min(SHRINK_FACTORS, key=lambda f: abs(f - float(found_ON[row, n]))))
            assert errors[chosen] <= min(errors) * (1 + 1e-3) + 1e-9


def test_values_outside_the_range_saturate_and_the_rest_is_rounded_more_finely():
    weight_OI = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weight_OI[0, 0] = 8
    number_format = Int(bits=4, block_size="row", scale_dtype="float32")
    half_ON = torch.full((1, 1), 0.5)
    rounded_OI = quantize_clipped(weight_OI, number_format, half_ON, half_ON).dequantize()
    assert rounded_OI[0, 0] == pytest.approx(4.0, abs=0.4)
    plain_OI = number_format.quantize(weight_OI).dequantize()
    assert (rounded_OI - weight_OI)[0, 1:].abs().sum() < (plain_OI - weight_OI)[0, 1:].abs().sum()


def test_an_outlier_is_clipped_where_its_input_is_small_and_kept_where_it_is_large():
    weight_OI = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weight_OI[0, 0] = 8
    number_format = Int(bits=3, block_size="row", symmetric=True)
    quiet, loud = torch.ones(64), torch.ones(64)
    quiet[0], loud[0] = 0.0, 1e4
    assert search_clipping(weight_OI, quiet.diag()[None], number_format).item() <= 0.6
    assert search_clipping(weight_OI, loud.diag()[None], number_format).item() == 1


def test_zeros_stay_zeros(weight_OI, x_TI):
    factors_ON = search_clipping(weight_OI, block_products(x_TI, 16), FORMATS[0])
    rounded = quantize_clipped(weight_OI, FORMATS[0], factors_ON, factors_ON)
    assert not rounded.dequantize()[3, 16:32].any()
    assert factors_ON[3, 1] == 1
