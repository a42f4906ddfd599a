"""Normal-float levels from their definition."""

import pytest
import torch

from lqer.formats import Int, NormalFloat
from lqer.formats.normalfloat import levels

# QLoRA, arXiv 2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def normal(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_four_normal_float_bits_are_nf4():
    torch.testing.assert_close(torch.tensor(levels(4)), torch.tensor(NF4), rtol=0.0, atol=2e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_quantiles_with_one_more_above_zero_than_below(bits):
    values = torch.tensor(levels(bits), dtype=torch.float64)
    half = 2 ** (bits - 1)
    assert len(values) == 2**bits
    assert (values.diff() > 0).all()
    assert values[0] == -1
    assert values[-1] == 1
    assert values[half - 1] == 0
    # Evenly spaced in probability on either side, by an independent normal distribution.
    scale = torch.special.ndtri(torch.tensor(1 - (1 / 30 + 1 / 32) / 2, dtype=torch.float64))
    probability = torch.special.ndtr(values * scale)
    for side in (probability[:half], probability[half - 1 :]):
        torch.testing.assert_close(side, torch.linspace(side[0], side[-1], len(side), dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_nearest_in_value_is_the_closest_level(bits):
    x = normal(4, 64)
    scale = x.abs().amax(-1, keepdim=True)
    distance = (x.unsqueeze(-1) - scale.unsqueeze(-1) * torch.tensor(levels(bits))).abs()
    codes = NormalFloat(bits, scale_dtype="float32").quantize(x).parts["codes"]
    assert torch.equal(codes.long(), distance.argmin(-1))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_nearest_in_cdf_is_the_closest_probability(bits):
    x = normal(32, 64)
    cut = torch.special.ndtri(torch.tensor(1 - (1 / 30 + 1 / 32) / 2, dtype=torch.float64))
    probability = torch.special.ndtr(x.double() / x.abs().max() * cut)
    levels_p = torch.special.ndtr(torch.tensor(levels(bits), dtype=torch.float64) * cut)
    expected = (probability.unsqueeze(-1) - levels_p).abs().argmin(-1)
    number_format = NormalFloat(bits, block_size="tensor", scale_dtype="float32", nearest="cdf")
    codes = number_format.quantize(x).parts["codes"]
    assert torch.equal(codes.long(), expected)
    by_value = NormalFloat(bits, block_size="tensor", scale_dtype="float32").quantize(x).parts["codes"]
    assert not torch.equal(codes, by_value)


def test_normal_values_lose_less_in_normal_float_than_in_uniform_levels():
    x = normal(64, 256)
    losses = [(f.fake_quantize(x) - x).square().mean() for f in (NormalFloat(4), Int(4, block_size=64, symmetric=True))]
    assert losses[0] < losses[1]


def test_a_scale_beyond_its_dtype_saturates():
    number_format = NormalFloat(4, scale_dtype="float16")
    assert number_format.fake_quantize(torch.tensor([1e7])).item() == 65504
    assert number_format.fake_quantize(torch.tensor([1e-9])).isfinite().all()
