"""Hidden states between two blocks: in memory, on disk, or on a GPU that has much room for them.

Shapes: W windows, T tokens of a window, D hidden size.
"""

from __future__ import annotations

import pytest
import torch
from helpers import resident

from lqer.models import walker
from lqer.models.backward import walk_backward
from lqer.models.hidden import HiddenStates, new_states, stay_on_gpu
from lqer.models.walker import walk_blocks
from lqer.store.offload import Offload

CPU = torch.device("cpu")
SHAPE = (4, 8, 16)
BYTES = 4 * 8 * 16 * 4


def test_states_stay_on_a_gpu_of_32_times_their_size():
    assert stay_on_gpu(2_500_000_000, 80_000_000_000)
    assert not stay_on_gpu(2_500_000_001, 80_000_000_000)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("limit", [None, BYTES, BYTES - 1])
def test_on_a_cpu_states_are_those_of_the_offload(tmp_path, near, limit):
    offload = Offload(limit, tmp_path)
    states_WTD = new_states(SHAPE, torch.float32, CPU, offload, near)
    assert (states_WTD.shape, states_WTD.device, states_WTD.is_pinned()) == (SHAPE, CPU, False)
    assert len(offload._mapped) == (limit == BYTES - 1)


@pytest.fixture
def asked(monkeypatch) -> list[bool]:
    """For each buffer that is embedded into, whether it may be near the blocks."""
    found: list[bool] = []

    def noted(*arguments) -> torch.Tensor:
        found.append(arguments[-1])
        return new_states(*arguments)

    monkeypatch.setattr(walker, "new_states", noted)
    return found


def test_a_walk_of_one_process_keeps_states_near_its_blocks(random_model, windows_WT, asked):
    next(walk_blocks(resident(random_model("llama")), windows_WT, 2))
    assert asked == [True]


def test_states_before_and_after_every_block_are_not_near(random_model, windows_WT, asked):
    next(walk_backward(resident(random_model("llama")), windows_WT, 2, seed=0))
    assert asked == [False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    DEVICE = torch.device("cuda", 0)

    @pytest.mark.parametrize("near", [False, True])
    def test_states_come_back_as_they_were_stored(self, near):
        offload = Offload()
        hidden = HiddenStates(
            new_states(SHAPE, torch.bfloat16, self.DEVICE, offload, near),
            [slice(0, 2), slice(2, 4)],
            offload,
            [],
            [],
            0,
        )
        for states in (hidden, hidden.empty_like()):
            assert states.states_WTD.is_cuda == near
            assert states.states_WTD.is_pinned() != near
            stored = torch.randn(2, 8, 16, device=self.DEVICE).to(torch.bfloat16)
            states.store(1, stored)
            assert torch.equal(states.load(1, self.DEVICE), stored)
            assert torch.equal(states.synchronized(self.DEVICE)[2:].to(self.DEVICE), stored)

    def test_what_takes_much_of_a_gpu_is_in_page_locked_memory(self, monkeypatch):
        monkeypatch.setattr("lqer.models.hidden.SHARE_OF_GPU", 0)
        states_WTD = new_states(SHAPE, torch.bfloat16, self.DEVICE, Offload(), near=True)
        assert states_WTD.is_pinned()
