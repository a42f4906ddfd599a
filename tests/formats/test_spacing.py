"""Evenly spaced values of number formats."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import E8P, Int, MXInt
from lqer.formats.blocks import from_blocks, to_blocks


@pytest.mark.parametrize(
    "number_format",
    [Int(bits=3, block_size=32), Int(bits=4, block_size="row", symmetric=True), MXInt(bits=3), MXInt(bits=4)],
)
def test_values_are_code_less_zero_times_step(number_format):
    weight = number_format.quantize(torch.randn(8, 96, generator=torch.Generator().manual_seed(0)))
    spacing = number_format.spacing(weight.parts)
    codes_OGg = to_blocks(weight.parts["codes"].float(), number_format.block_size)
    values_OGg = (codes_OGg - spacing.zero_G[..., None]) * spacing.step_G[..., None]
    assert torch.equal(from_blocks(values_OGg, 96), weight.dequantize())
    assert spacing.min_code <= codes_OGg.min()
    assert codes_OGg.max() <= spacing.max_code


def test_lattice_codes_have_no_spacing():
    assert E8P(bits=2).spacing({}) is None
