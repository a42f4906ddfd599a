"""MXINT values from the kernel against those in PyTorch; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import MXInt, agreement, mxint_kernel
from lqer.formats.base import NumberFormat
from lqer.formats.mxint_kernel import fits, round_values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [MXInt(8), MXInt(4, 32), MXInt(3, 16, "floor"), MXInt(8, 16, "floor")]


def in_kernel(number_format: MXInt, x: torch.Tensor, axis: int) -> torch.Tensor:
    block = min(number_format.block_size, x.shape[axis])
    assert fits(x, block, axis)
    ceil = number_format.scale_rounding == "ceil"
    return round_values(x, block, axis, number_format.fraction_bits, ceil, number_format.max_code)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 64), 2), ((3, 64, 5), 1), ((64, 130), 0), ((4, 8), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_those_in_pytorch(number_format, shape, axis, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(4).exp2()
    x = x.to(DEVICE, dtype)
    found = in_kernel(number_format, x, axis)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found, NumberFormat.fake_quantize(number_format, x, axis))


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_zeros_extremes_and_what_is_not_finite_are_rounded_as_in_pytorch(number_format):
    x = torch.zeros(8, 32)
    x[1, 3], x[2, 3], x[2, 4] = 1e-42, 3e38, -3.4e38
    x[3, 3], x[4, 3], x[5, 3] = torch.inf, torch.nan, -torch.inf
    x[3, 4] = 1.0
    x[6] = 2.0**-126
    x = x.to(DEVICE)
    expected = NumberFormat.fake_quantize(number_format, x)
    torch.testing.assert_close(in_kernel(number_format, x, 1), expected, rtol=0.0, atol=0.0, equal_nan=True)


def test_ragged_blocks_are_left_to_pytorch():
    assert not fits(torch.ones(3, 40), 16, 1)
    assert not fits(torch.ones(3, 40), 20, 1)
    assert fits(torch.ones(3, 40), 8, 1)


@pytest.mark.parametrize("in_rows", [True, False])
@pytest.mark.parametrize("block", [4, 16], ids=["an axis shorter than a block", "whole blocks"])
def test_it_is_used_where_it_agrees_with_pytorch_and_not_where_it_is_broken(monkeypatch, in_rows, block):
    monkeypatch.setattr(agreement, "_agreed", {})
    assert MXInt(8)._kernel_agrees(block, in_rows, torch.float16, torch.device(DEVICE))
    agreement._agreed.clear()
    monkeypatch.setattr(mxint_kernel, "round_values", lambda x, *_: x)
    assert not MXInt(8)._kernel_agrees(block, in_rows, torch.float16, torch.device(DEVICE))
