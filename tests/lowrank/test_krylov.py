"""How the solver's work is spread over a GPU and the CPU; its solutions are tested with the other solver's."""

from __future__ import annotations

import pytest
import torch

from lqer.lowrank.krylov import _one_thread


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
