"""Values of number formats that are evenly spaced, or multiples of a few levels."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import E8P, MX, Int, MXInt, NormalFloat
from lqer.formats.blocks import from_blocks, to_blocks
from lqer.formats.mx import ELEMENTS


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


@pytest.mark.parametrize(
    "number_format",
    [
        *(MX(element) for element in ELEMENTS),
        MX("mxfp4_e2m1", element_rounding="away"),
        NormalFloat(4, 32),
        NormalFloat(3, "row", "cdf"),
    ],
    ids=str,
)
def test_the_level_of_a_value_is_told_by_the_boundaries_below_it(number_format):
    x_OI = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    # Multiples of a power of two, many of which are half-way between two levels.
    x_OI[4:] = (x_OI[4:] * 16).round() / 16
    x_OI[7] = 0
    weight = number_format.quantize(x_OI)
    levels = number_format.fixed_levels(weight.parts)
    share_OGg = to_blocks(x_OI, number_format.block_size) / levels.step_G.clamp(min=1e-30)[..., None]
    index_OI = from_blocks((share_OGg.unsqueeze(-1) > levels.boundaries_K).sum(-1), 96)
    parts = {**weight.parts, "codes": levels.codes_K[index_OI]}
    assert torch.equal(number_format.dequantize_parts(parts), weight.dequantize())
    values_OGg = to_blocks(levels.levels_K[index_OI], number_format.block_size) * levels.step_G[..., None]
    assert torch.equal(from_blocks(values_OGg, 96), weight.dequantize())


def test_lattice_codes_have_neither_spacing_nor_levels():
    assert E8P(bits=2).spacing({}) is None
    assert E8P(bits=2).fixed_levels({}) is None
