"""MXINT rounding on the device equals lqer.formats bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_layers import DEVICE, ON_GPU
from torch import Tensor

from lqer.formats import MXInt
from lqer.kernels import activation_rounding
from lqer.kernels.rounding import round_columns, round_rows

ROWS, COLUMNS = 64, 128


@triton.jit
def round_kernel(x, y, rounding: tl.constexpr, along_rows: tl.constexpr):
    place = tl.arange(0, 64)[:, None] * 128 + tl.arange(0, 128)[None, :]
    values = tl.load(x + tl.program_id(0) * 64 * 128 + place)
    if along_rows:
        values = round_rows(values, rounding)
    else:
        values = round_columns(values, rounding)
    tl.store(y + tl.program_id(0) * 64 * 128 + place, values)


def rounded(x: Tensor, number_format: MXInt, along_rows: bool = False) -> Tensor:
    y = torch.full_like(x, torch.nan)
    round_kernel[(len(x) // ROWS,)](x, y, activation_rounding(number_format), along_rows)
    return y


def edge_blocks() -> Tensor:
    """Powers of two as maxima, ties, zeros, subnormals, the largest floats, and random magnitudes in between."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    x *= (
        torch.exp2(torch.randint(-140, 120, (ROWS, COLUMNS // 16, 1), generator=generator).float())
        .expand(ROWS, COLUMNS // 16, 16)
        .reshape(ROWS, COLUMNS)
    )
    x[0] = 0
    x[1, ::16] = 1.0
    x[2] = torch.arange(COLUMNS) / 16 - 4
    x[3] = 2.0**-149 * torch.arange(COLUMNS)
    x[4, :16] = 3.4e38
    x[5, :32] = -(2.0 ** torch.arange(-40, -8))
    x[6, 3] = -0.0
    return x.to(DEVICE)


@pytest.mark.parametrize("scale_rounding", ["ceil", "floor"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("block", [16, 32])
def test_rounding_equals_the_format(bits, block, scale_rounding):
    number_format = MXInt(bits, block, scale_rounding)
    random = torch.randn(ROWS * (122 if ON_GPU else 2), COLUMNS, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x = torch.cat([edge_blocks(), random])
    expected = number_format.fake_quantize(x)
    assert torch.equal(rounded(x, number_format), expected)


def test_blocks_may_be_along_the_rows():
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert torch.equal(rounded(x, MXInt(8), along_rows=True), MXInt(8).fake_quantize(x, axis=0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_nan_or_infinity_becomes_nan_and_no_other(value):
    x = torch.ones(ROWS, COLUMNS, device=DEVICE)
    x[5, 20] = value
    y = rounded(x, MXInt(8))
    assert y[5, 16:32].isnan().all()
    y[5, 16:32] = 0
    assert not y.isnan().any()
