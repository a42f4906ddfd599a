"""E[(x_o - x) xᵀ] against float64.

Shapes: T tokens of the whole text, N tokens of a batch, I in_features.
"""

from __future__ import annotations

import pytest
import torch

from lqer.statistics import Mismatch
from lqer.store.offload import Offload
from lqer.transforms.hadamard import random_hadamard

CPU = torch.device("cpu")
NONE_SAMPLED = torch.empty(0, dtype=torch.int64)


@pytest.fixture
def pair_TI():
    generator = torch.Generator().manual_seed(0)
    original_TI = torch.randn(1500, 24, generator=generator)
    return original_TI, original_TI + 0.1 * torch.randn(1500, 24, generator=generator) - 0.05 * original_TI


def gathered(original_TI, x_TI, *weights_T, batch=700):
    accumulator = Mismatch().accumulator(x_TI.shape[1], CPU, Offload())
    for original_NI, x_NI, *weights_N in zip(*(x.split(batch) for x in (original_TI, x_TI, *weights_T)), strict=True):
        accumulator.add(x_NI, original_NI, NONE_SAMPLED, *weights_N)
    return accumulator.result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_it_is_the_mean_product_of_drift_and_input(dtype, is_weighted, pair_TI):
    original_TI, x_TI = (x.to(dtype) for x in pair_TI)
    weights_T = torch.linspace(1e-12, 1e-9, len(x_TI)) if is_weighted else torch.ones(len(x_TI))
    found_II = gathered(original_TI, x_TI, *([weights_T] if is_weighted else []))
    drift_TI = original_TI.double() - x_TI.double()
    exact_II = (drift_TI.T * weights_T.double()) @ x_TI.double() / weights_T.double().sum()
    assert found_II.dtype == torch.float32
    # Differences are rounded to bfloat16 once more.
    torch.testing.assert_close(found_II.double(), exact_II, rtol=0, atol=2e-5 if dtype == torch.bfloat16 else 1e-6)


def test_equal_inputs_have_no_mismatch_at_all(pair_TI):
    for dtype in (torch.float32, torch.bfloat16):
        x_TI = pair_TI[0].to(dtype)
        assert not gathered(x_TI, x_TI, torch.rand(1500)).any()


def test_that_of_rotated_inputs_follows(pair_TI):
    rotation = random_hadamard(24, 24, seed=0)
    found_II = Mismatch().rotated(gathered(*pair_TI), rotation)
    torch.testing.assert_close(found_II.float(), gathered(*map(rotation.input, pair_TI)), rtol=0, atol=1e-5)
