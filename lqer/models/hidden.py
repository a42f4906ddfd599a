"""The hidden states of a text between two blocks, and where they are kept.

For a GPU they are in page-locked memory, from which each block's pass copies them and into which it copies them back.
Where they take little of the GPU's memory they stay there: 128 windows of 2048 tokens of a 7B model are 2 GB, whose
three copies a block would take 0.12 s at 53 GB/s (an H200, page-locked memory).

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lqer.errors import ModelError
from lqer.models.calls import BlockCall, Left, Returned
from lqer.statistics import ALONE, Gang
from lqer.store.offload import Offload

DEPENDS_ON_BATCH = (
    "model: its decoder blocks are called with arguments that depend on the batch (such as ALiBi biases, embeddings of "
    "the tokens, or keys and values of other blocks), which transforms and roundings of whole blocks do not support"
)
# Hidden states of all windows stay on a GPU if they take at most this share of its memory. Up to three such streams go
# beside each other, and several runs may share a GPU.
SHARE_OF_GPU = 1 / 32


def stay_on_gpu(size: int, gpu_bytes: int) -> bool:
    """Whether hidden states of that many bytes stay on a GPU with that much memory."""
    return size <= SHARE_OF_GPU * gpu_bytes


def new_states(shape: Sequence[int], dtype: torch.dtype, device: torch.device, offload: Offload, near: bool) -> Tensor:
    """Undefined states (W, T, D) for blocks that run on `device`: on the CPU, from the offload, page-locked for a GPU.

    near: on the GPU itself where they take little of it.
    """
    if device.type != "cuda":
        return offload.empty(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    if near and stay_on_gpu(size, torch.cuda.get_device_properties(device).total_memory):
        return torch.empty(*shape, dtype=dtype, device=device)
    return offload.empty(shape, dtype, pinned=True)


@dataclass
class HiddenStates:
    """The hidden states of all windows between two blocks, and the arguments that each block is called with.

    states_WTD: in the model's dtype, from `new_states`; the windows of a batch are contiguous.
    calls: per block, the call for each batch; batches with equal arguments share them.
    calls_of_one: per block, the call for a single window, whose arguments broadcast over a batch of any size; None
        where they depend on the windows of the batch or on their number.
    left: by batch, what the blocks so far left for later ones.
    gang, first_window: where several processes share out the windows, they, and which of the whole text is first here.
    """

    states_WTD: Tensor
    batches: list[slice]
    offload: Offload
    calls: list[list[BlockCall]]
    calls_of_one: list[BlockCall | None]
    # How many values a block returns as a tuple, the first of which are its hidden states; 0 for a tensor alone.
    returned_values: int
    left: dict[int, Left] = field(default_factory=dict)
    gang: Gang = ALONE
    first_window: int = 0

    def load(self, batch: int, device: torch.device) -> Tensor:
        """The states (B, T, D) of one batch, on the device."""
        return self.states_WTD[self.batches[batch]].to(device, non_blocking=True)

    def store(self, batch: int, hidden_BTD: Tensor) -> None:
        """Replace the states of one batch."""
        # Ordered on the device's stream, on which `load` reads them too.
        self.states_WTD[self.batches[batch]].copy_(hidden_BTD, non_blocking=True)
        self.offload.release_pages()

    def call_of_one(self, block: int) -> BlockCall:
        """The call that suits a batch of any windows, without what other blocks return. Raises ModelError if none does.

        Whether the block needs what is left out, the probe has found out (probe.py).
        """
        call = self.calls_of_one[block]
        if call is None or any(not isinstance(key, Returned) for left in self.left.values() for key in left):
            raise ModelError(DEPENDS_ON_BATCH)
        return call.without_returned()

    def synchronized(self, device: torch.device) -> Tensor:
        """All states (W, T, D), safe to read from any thread or stream: this one's stream has finished writing them."""
        if device.type == "cuda":
            # Not for the whole device: beside this stream, spectra of an earlier block may take seconds.
            torch.cuda.current_stream(device).synchronize()
        return self.states_WTD

    def empty_like(self) -> HiddenStates:
        """A second buffer of undefined states for the same windows and calls."""
        states_WTD = self.states_WTD
        if states_WTD.is_cuda:
            return replace(self, states_WTD=torch.empty_like(states_WTD), left={})
        pinned = states_WTD.is_pinned()
        return replace(self, states_WTD=self.offload.empty(states_WTD.shape, states_WTD.dtype, pinned), left={})
