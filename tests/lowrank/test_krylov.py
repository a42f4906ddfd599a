"""How the solver decides that a space is large enough; its solutions are tested with the other solver's."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import MXInt
from lqer.lowrank.krylov import BLOCKS_AT_ONCE, GAP_TOLERANCE, _Convergence, _iterate, _one_thread
from lqer.lowrank.metric import Metric


@pytest.mark.parametrize("trusted", [1, 2])
def test_the_last_space_is_known_where_gains_are_geometric(trusted):
    """Of gains 1, 1/2, 1/4, .. the limit is known from the third, and what is missed is the last gain."""
    energy, tolerance = 12.0, 1.0
    convergence, enough = _Convergence(trusted), []
    for step in range(1, 12):
        convergence.add(2.0 - 0.5 ** (step - 1))
        enough.append(convergence.is_enough(energy, tolerance))
    first = enough.index(True)
    assert 0.5**first <= GAP_TOLERANCE * 2 < 0.5 ** (first - 1)


def test_of_neighbouring_spaces_two_limits_are_needed_and_the_higher_one_counts():
    convergence = _Convergence(trusted=2)
    # A plateau after which a cluster of eigenvalues is found.
    for captured in (1.0, 1.5, 1.75, 1.75):
        convergence.add(captured)
    assert convergence.limits == [2.0, 1.75]
    assert convergence.missed == 0.25


def flat_error(rows: int, columns: int) -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=generator)
    scale_I = (0.3 * torch.randn(columns, generator=generator)).exp()
    return weight_OI - MXInt(bits=4).quantize(weight_OI).dequantize(), Metric(scale_I=scale_I)


def test_a_gpu_that_looks_at_every_second_space_captures_as_much():
    error_OI, metric = flat_error(768, 1024)
    each, second = (_iterate(error_OI, metric, 32, 24, 0, at_once) for at_once in (1, BLOCKS_AT_ONCE))
    assert second.gap <= GAP_TOLERANCE
    assert float(second.singular_values_R.square().sum()) >= 0.998 * float(each.singular_values_R.square().sum())


def test_a_space_that_cannot_grow_by_whole_strides_is_looked_at_when_it_is_largest():
    """Five blocks of 48 rows fit in 240, and an error without structure is never captured well enough."""
    error_OI = torch.randn(240, 300, generator=torch.Generator().manual_seed(1))
    found = _iterate(error_OI, Metric(), 32, 48, 0, BLOCKS_AT_ONCE)
    optimum = float(torch.linalg.svdvals(error_OI.double())[:32].square().sum())
    assert float(found.singular_values_R.square().sum()) == pytest.approx(optimum, rel=1e-6)


@_one_thread()
def fail_on_one_thread():
    assert torch.get_num_threads() == 1
    raise ValueError("broken")


def test_threads_are_given_back_after_an_error_too():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="broken"):
            fail_on_one_thread()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
