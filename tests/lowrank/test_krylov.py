"""How the solver's work is spread over a GPU and the CPU; its solutions are tested with the other solver's."""

from __future__ import annotations

import pytest
import torch

from lqer.lowrank.krylov import GAP_TOLERANCE, _Convergence, _one_ahead, _one_thread


def test_a_block_is_handed_on_once_the_next_one_is_started():
    started = []

    def blocks():
        for index in range(4):
            started.append(index)
            yield index

    seen = [(block, list(started)) for block in _one_ahead(blocks())]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]


def test_the_last_space_but_one_is_known_where_gains_are_geometric():
    """Of gains 1, 1/2, 1/4, .. the limit is known from the third, and what is missed is the last gain."""
    energy, tolerance = 12.0, 1.0
    convergence, near, enough = _Convergence(), [], []
    for step in range(1, 12):
        convergence.add(2.0 - 0.5 ** (step - 1))
        near.append(convergence.is_near(energy, tolerance))
        enough.append(convergence.is_enough(energy, tolerance))
    first = enough.index(True)
    assert near.index(True) == first - 1
    assert 0.5**first <= GAP_TOLERANCE * 2 < 0.5 ** (first - 1)


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
