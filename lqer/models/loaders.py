"""Decoder blocks at hand one at a time: of a model that is whole in memory, or read from disk for each visit.

A model that is read from disk is a skeleton: its parameters have shapes and no values. What surrounds the blocks is
filled once; a block is filled in a copy that lives as long as its visit, so memory holds one block (two where the next
is read ahead for a GPU), however many there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.models.structure import find_blocks
from lqer.store.offload import Offload


class BlockLoader(Protocol):
    """Where the blocks of a model come from, and what surrounds them."""

    def load_outer(self) -> None:
        """Have everything outside the blocks in memory; later calls do nothing."""

    def visits(
        self, blocks: nn.ModuleList, indices: Sequence[int], device: torch.device
    ) -> Iterator[tuple[int, nn.Module]]:
        """The blocks of these indices in turn, each on `device` until the next is asked for."""

    def materialize(self, blocks: nn.ModuleList, home: Callable[[int], torch.device]) -> None:
        """Have all blocks in memory for good, the one of each index on `home(index)`."""


class Resident:
    """The blocks of a model in memory: moved to the device for their visit and back home after it."""

    def load_outer(self) -> None:
        pass

    def visits(
        self, blocks: nn.ModuleList, indices: Sequence[int], device: torch.device
    ) -> Iterator[tuple[int, nn.Module]]:
        for index in indices:
            block = blocks[index]
            home = next(block.parameters()).device
            yield index, block.to(device)
            block.to(home)

    def materialize(self, blocks: nn.ModuleList, home: Callable[[int], torch.device]) -> None:
        for index, block in enumerate(blocks):
            block.to(home(index))


@dataclass
class Streamed:
    """Blocks of a skeleton, filled from disk.

    read(index)                     the block's tensors, on the CPU; may run in a thread of its own
    fill(block, index, tensors, device)   puts them into a copy of the block; takes them out of the dictionary
    fill_outer()                      fills what lies outside the blocks
    ahead                           read the next block while one is visited
    """

    read: Callable[[int], dict[str, Tensor]]
    fill: Callable[[nn.Module, int, dict[str, Tensor], torch.device], None]
    fill_outer: Callable[[], None]
    ahead: bool
    _is_complete: bool = field(default=False, init=False)

    def load_outer(self) -> None:
        if not self._is_complete:
            self.fill_outer()
            self._is_complete = True

    def visits(
        self, blocks: nn.ModuleList, indices: Sequence[int], device: torch.device
    ) -> Iterator[tuple[int, nn.Module]]:
        for index, tensors in self._read_all(indices):
            block = copy.deepcopy(blocks[index])
            self.fill(block, index, tensors, device)
            yield index, block.to(device)
            _free(block)

    def materialize(self, blocks: nn.ModuleList, home: Callable[[int], torch.device]) -> None:
        for index, tensors in self._read_all(range(len(blocks))):
            self.fill(blocks[index], index, tensors, home(index))
            blocks[index].to(home(index))

    def _read_all(self, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        if not self.ahead:
            for index in indices:
                yield index, self.read(index)
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
            coming = [reader.submit(self.read, index) for index in indices[:1]]
            for place, index in enumerate(indices):
                tensors = coming.pop().result()
                coming += [reader.submit(self.read, later) for later in indices[place + 1 : place + 2]]
                yield index, tensors
                del tensors


def _free(block: nn.Module) -> None:
    """Give a block's memory back now: a caller's loop variable would keep it until the next one is filled."""
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


RESIDENT = Resident()


@dataclass(frozen=True)
class OpenedModel:
    """A model with its blocks at hand: `model` is whole, or a skeleton that `loader` fills block by block.

    device: where it is worked on. offload: where hidden states lie meanwhile.
    """

    model: PreTrainedModel
    name: str
    blocks: nn.ModuleList
    loader: BlockLoader
    device: torch.device
    offload: Offload

    @classmethod
    def resident(cls, model: PreTrainedModel, device: torch.device, offload: Offload) -> OpenedModel:
        """Raises ModelError if the model has no blocks that can be quantized."""
        return cls(model, *find_blocks(model), RESIDENT, device, offload)
