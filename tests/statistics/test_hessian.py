"""E[x xᵀ] against float64, whatever the batches and dtypes.

Shapes: T tokens of the whole text, N tokens of a batch, I in_features.
"""

from __future__ import annotations

import pytest
import torch

from lqer.statistics import Hessian, MaxAbs, MeanAbs, MeanSquare, Sample
from lqer.store.offload import Offload

CPU = torch.device("cpu")
NONE_SAMPLED = torch.empty(0, dtype=torch.int64)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=needs_gpu)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["even", "outliers"])
def test_the_hessian_does_not_depend_on_the_batches(scales, dtype, device):
    """Within 1e-6 of float64's and of each other, relative to sqrt(H_ii H_jj)."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(4000, 48, generator=generator) + 0.5
    if scales == "outliers":
        x_TI *= torch.logspace(-2, 3, 48)
    x_TI = x_TI.to(dtype)
    found = []
    for batch in (1, 700, 4000):
        hessian = Hessian().accumulator(48, device, Offload())
        for x_NI in x_TI.to(device).split(batch):
            hessian.add(x_NI, None, NONE_SAMPLED)
        stored_II = hessian.result()
        assert stored_II.dtype == torch.float32
        assert torch.equal(stored_II, stored_II.T)
        found.append(stored_II.cpu().double())
    exact_II = x_TI.double().T @ x_TI.double() / len(x_TI)
    size_II = (exact_II.diagonal()[:, None] * exact_II.diagonal()).sqrt()
    for one_II in found:
        assert ((one_II - exact_II).abs() / size_II).max() < 1e-6
        assert ((one_II - found[0]).abs() / size_II).max() < 1e-6


WEIGHTED = [Hessian(), MeanSquare()]
each_weighted = pytest.mark.parametrize("statistic", WEIGHTED, ids=lambda statistic: statistic.kind)


def gathered(statistic, batches):
    accumulator = statistic.accumulator(24, CPU, Offload())
    for x_NI, weights in batches:
        accumulator.add(x_NI, None, NONE_SAMPLED, *weights)
    return accumulator.result()


@each_weighted
def test_weights_that_are_whole_numbers_are_repeated_tokens(statistic):
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(60, 24, generator=generator)
    counts_T = torch.randint(0, 4, (60,), generator=generator)
    repeated = gathered(statistic, [(x_TI.repeat_interleave(counts_T, 0), ())])
    batches = [(x_TI[rows], (0.5 * counts_T[rows].float(),)) for rows in (slice(0, 13), slice(13, 60))]
    torch.testing.assert_close(gathered(statistic, batches), repeated, rtol=1e-5, atol=1e-6)


@each_weighted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_smaller_than_any_float16_are_kept(statistic, dtype):
    x_TI = torch.randn(500, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights_T = torch.linspace(1e-12, 1e-9, 500)
    found = gathered(statistic, [(x_TI, (weights_T,))])
    exact_II = (x_TI.double().T * weights_T.double()) @ x_TI.double() / weights_T.double().sum()
    exact = exact_II if statistic == Hessian() else exact_II.diagonal()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3)


def test_statistics_that_weight_tokens_say_so():
    assert all(statistic.weights_tokens for statistic in WEIGHTED)
    assert not any(statistic.weights_tokens for statistic in (MeanAbs(), MaxAbs(), Sample()))
