"""Sums of outer products against float64; the kernel without a GPU in Triton's interpreter.

Shapes: N tokens, I in_features.
"""

from __future__ import annotations

import pytest
import torch

from lqer.statistics.products import add_products, mirrored_mean, symmetric_mean
from lqer.statistics.products_kernel import MOST_TOKENS, PROMOTED, add_half_products

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter truncates to bfloat16.
HALF = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def inputs(tokens, features, dtype=torch.float32, seed=0, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, features, generator=generator) + shift).to(dtype).to(DEVICE)


def relative_error(found_II, x_NI, y_NI) -> float:
    """Relative to the roots of Σ x_i² Σ y_j², of the largest entry."""
    x_NI, y_NI = x_NI.double(), y_NI.double()
    size_II = torch.outer(x_NI.square().sum(0), y_NI.square().sum(0)).sqrt()
    return float(((found_II - x_NI.T @ y_NI).abs() / size_II).max())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("tokens", "features"), [(1, 5), (PROMOTED + 1, 128), (300, 130)])
def test_the_kernel_adds_every_product_to_what_is_there(tokens, features, dtype):
    x_NI, y_NI = inputs(tokens, features, dtype), inputs(tokens, features, dtype, seed=1)
    sum_II = torch.full((features, features), 7.0, dtype=torch.float64, device=DEVICE)
    add_half_products(sum_II, x_NI, y_NI, lower=False)
    assert relative_error(sum_II - 7, x_NI, y_NI) < 5e-7


def test_only_tiles_above_the_diagonal_are_left_out():
    x_NI = inputs(40, 300, HALF[0])
    sum_II = torch.zeros(300, 300, dtype=torch.float64, device=DEVICE)
    add_half_products(sum_II, x_NI, x_NI, lower=True)
    assert relative_error(sum_II.tril(), x_NI, x_NI) >= 0.01  # what is above is missing
    mean_II = mirrored_mean(sum_II, 1)
    assert torch.equal(mean_II, mean_II.T)
    assert relative_error(mean_II.double(), x_NI, x_NI) < 1e-6
    assert not sum_II[:128, 256:].any()


@pytest.mark.parametrize("tokens", [PROMOTED, pytest.param(8 * MOST_TOKENS, marks=needs_gpu)])
@pytest.mark.parametrize("dtype", HALF)
def test_a_sum_of_squares_does_not_lose_with_its_length(tokens, dtype):
    """Tensor cores cut off: after 512 tokens at once 2e-6 of a diagonal would be lost (H100), after 4096 2e-5."""
    x_NI = inputs(tokens, 96, dtype, shift=2.0)
    sum_II = torch.zeros(96, 96, dtype=torch.float64, device=DEVICE)
    add_half_products(sum_II, x_NI, x_NI, lower=True)
    assert relative_error(mirrored_mean(sum_II, 1).double(), x_NI, x_NI) < 1e-6


@needs_gpu
@pytest.mark.parametrize("features", [4096, 11008])
def test_sums_of_wide_inputs_on_a_gpu_are_exact_to_a_millionth(features):
    x_NI, y_NI = inputs(5000, features, torch.bfloat16), inputs(5000, features, torch.bfloat16, seed=1)
    for other_NI in (None, y_NI):
        sum_II = torch.zeros(features, features, dtype=torch.float64, device=DEVICE)
        add_products(sum_II, x_NI, other_NI)
        found_II = mirrored_mean(sum_II, 1).double() if other_NI is None else sum_II
        assert relative_error(found_II, x_NI, x_NI if other_NI is None else other_NI) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_cpu_half_precision_is_summed_as_its_float32_values(dtype):
    x_NI = inputs(1300, 24, dtype).cpu()
    sums = torch.zeros(2, 24, 24, dtype=torch.float64)
    for sum_II, values_NI in zip(sums, (x_NI, x_NI.float()), strict=True):
        add_products(sum_II, values_NI)
    assert torch.equal(*sums)


def test_a_mean_is_symmetric_to_the_last_bit():
    sum_II = torch.randn(700, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for mean, expected_II in (
        (symmetric_mean, (sum_II + sum_II.T) / 2), (mirrored_mean, sum_II.tril() + sum_II.tril(-1).T)
    ):  # fmt: skip
        mean_II = mean(sum_II, 4)
        assert torch.equal(mean_II, mean_II.T)
        torch.testing.assert_close(mean_II, (expected_II / 4).float())
