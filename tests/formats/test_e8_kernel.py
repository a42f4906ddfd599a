"""The search for lattice points on a GPU against the one in PyTorch; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import e8_kernel
from lqer.formats.e8 import e8p_points
from lqer.formats.e8_kernel import nearest
from lqer.formats.e8_search import _nearest_e8p

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes as long for a program of many vectors as for one of few."""
    if DEVICE == "cpu":
        monkeypatch.setattr(e8_kernel, "VECTORS", 2048)


def vectors(count, scale=1.0):
    return scale * torch.randn(count, 8, generator=torch.Generator().manual_seed(count))


def grid(count, step):
    """Multiples of a power of two, for which distances are exact and ties abound."""
    steps = int(4 / step)
    return torch.randint(-steps, steps + 1, (count, 8), generator=torch.Generator().manual_seed(0)) * step


@pytest.mark.parametrize("x_V8", [vectors(3000), vectors(700, 3.0), vectors(1, 0.1)], ids=["normal", "outside", "one"])
def test_it_finds_what_the_search_in_pytorch_finds(x_V8):
    codes_V, expected_V = nearest(x_V8.to(DEVICE)).cpu(), _nearest_e8p(x_V8)
    points_P8 = e8p_points(torch.device("cpu"))
    # Sums are added up in another order, so that of two points that are equally near either may be found.
    assert (codes_V != expected_V).float().mean() < 1e-3
    distances = [(x_V8 - points_P8[found_V]).square().sum(1) for found_V in (codes_V, expected_V)]
    torch.testing.assert_close(*distances, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [0.25, 0.125])
def test_of_equally_near_points_it_finds_the_lowest_code(step):
    x_V8 = grid(2000, step)
    assert torch.equal(nearest(x_V8.to(DEVICE)).cpu(), _nearest_e8p(x_V8))


def test_every_point_is_its_own_nearest():
    codes_V = torch.arange(0, 65536, 16)
    assert torch.equal(nearest(e8p_points(torch.device("cpu"))[codes_V].to(DEVICE)).cpu(), codes_V)


def test_nan_is_read_as_zero_and_no_vectors_have_no_codes():
    x_V8 = vectors(5)
    x_V8[2, 3] = torch.nan
    assert torch.equal(nearest(x_V8.to(DEVICE)).cpu(), _nearest_e8p(x_V8.nan_to_num(0.0)))
    assert nearest(x_V8[:0].to(DEVICE)).shape == (0,)
