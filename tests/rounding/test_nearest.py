"""Rounding to nearest, and the table of roundings.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

import pytest
import torch

from lqer.components import component_from_dict
from lqer.formats import E8P, Int, MXInt, NonFiniteError, NormalFloat
from lqer.rounding import ROUNDINGS, Nearest, Rounding


@pytest.mark.parametrize("number_format", [MXInt(bits=3), Int(bits=4, block_size=16)], ids=lambda f: f.kind)
def test_it_is_the_formats_own_rounding_along_in_features(number_format):
    weight_OI = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    rounded = Nearest().round(weight_OI, {}, number_format)
    assert rounded.axis == 1
    assert torch.equal(rounded.dequantize(), number_format.quantize(weight_OI).dequantize())


FIT, SEARCH = Nearest(), Nearest(scales="search")


@pytest.mark.parametrize(
    ("rounding", "number_format"),
    [
        (FIT, MXInt(bits=3)), (FIT, Int(bits=4, block_size=16)), (FIT, NormalFloat(bits=4)), (FIT, E8P(bits=2)),
        (FIT, Int(bits=3, block_size="tensor")), (SEARCH, Int(bits=4, block_size=16)),
    ],
    ids=lambda part: part.scales if isinstance(part, Nearest) else f"{part.kind} {part.block_size}",
)  # fmt: skip
def test_several_weights_are_rounded_together_as_each_alone(rounding, number_format):
    generator = torch.Generator().manual_seed(0)
    weights = [scale * torch.randn(24, 48, generator=generator) for scale in (0.1, 1.0, 3.0)]
    statistics = [{"mean_square": torch.rand(48, generator=generator)} for _ in weights]
    together = rounding.round_together(weights, statistics, number_format)
    for weight_OI, its, found in zip(weights, statistics, together, strict=True):
        alone = rounding.round(weight_OI, its, number_format)
        assert (found.shape, found.axis, found.parts.keys()) == (alone.shape, alone.axis, alone.parts.keys())
        assert all(torch.equal(found.parts[name], part) for name, part in alone.parts.items())


def test_a_weight_with_infinities_is_refused():
    with pytest.raises(NonFiniteError, match="1 infinite"):
        Nearest().round(torch.tensor([[1.0, torch.inf]]), None, MXInt(bits=4))


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_every_rounding_survives_being_written_down(kind):
    rounding = ROUNDINGS[kind]()
    assert component_from_dict(Rounding, rounding.to_dict()) == rounding
    assert rounding.to_dict()["kind"] == kind


def test_unknown_kinds_and_keys_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"unknown rounding 'farthest'; allowed: adaptive, .*did you mean 'nearest'"):
        component_from_dict(Rounding, {"kind": "farthest"})
    with pytest.raises(ValueError, match="unknown key 'damping' of rounding \"nearest\"; allowed: scales"):
        component_from_dict(Rounding, {"kind": "nearest", "damping": 0.1})
