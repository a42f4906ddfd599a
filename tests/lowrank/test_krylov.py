"""How the solver's work is spread over a GPU and the CPU; its solutions are tested with the other solver's."""

from __future__ import annotations

import pytest
import torch

from lqer.lowrank.krylov import _one_ahead, _one_thread


def test_a_block_is_handed_on_once_the_next_one_is_started():
    started = []

    def blocks():
        for index in range(4):
            started.append(index)
            yield index

    seen = [(block, list(started)) for block in _one_ahead(blocks())]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]


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
