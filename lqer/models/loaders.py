"""Loads decoder blocks one at a time: of a model that is in memory, or from disk.

A model that is read from disk is a skeleton: its parameters have shapes and no values. Everything outside the blocks is
loaded once; a block is loaded into a copy that is freed before the next one, so memory holds one block (two where the
next one is read ahead for a GPU), however many there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.models.structure import find_blocks
from lqer.phases import phase
from lqer.statistics import ALONE, Gang
from lqer.store.offload import Offload


class BlockLoader(Protocol):
    """Loads the blocks of a model, and the modules outside them.

    gives_copies: whether a block is nobody else's, so that whoever gets it may change it.
    """

    gives_copies: ClassVar[bool]

    def load_outer(self) -> None:
        """Load everything outside the blocks; later calls do nothing."""

    def load_each(
        self, blocks: nn.ModuleList, indices: Sequence[int], device: torch.device
    ) -> Iterator[tuple[int, nn.Module]]:
        """Index and block for each of `indices` in order; a block is on `device` until the next one is asked for."""

    def values_of_each(
        self, blocks: nn.ModuleList, indices: Sequence[int]
    ) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Index, and parameters and buffers by name, for each of `indices` in order.

        Of a model on disk each tensor is read when it is asked for, so that no block is in memory as a whole.
        """

    def materialize(self, blocks: nn.ModuleList, device_of: Callable[[int], torch.device]) -> None:
        """Load all blocks for good, the one of each index to `device_of(index)`."""


class Resident:
    """The blocks of a model in memory: each is moved to the device while it is used, and back."""

    gives_copies: ClassVar[bool] = False

    def load_outer(self) -> None:
        pass

    def load_each(
        self, blocks: nn.ModuleList, indices: Sequence[int], device: torch.device
    ) -> Iterator[tuple[int, nn.Module]]:
        for index in indices:
            block = blocks[index]
            own_device = next(block.parameters()).device
            yield index, block.to(device)
            block.to(own_device)

    def values_of_each(
        self, blocks: nn.ModuleList, indices: Sequence[int]
    ) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        return ((index, blocks[index].state_dict()) for index in indices)

    def materialize(self, blocks: nn.ModuleList, device_of: Callable[[int], torch.device]) -> None:
        for index, block in enumerate(blocks):
            block.to(device_of(index))


@dataclass
class Streamed:
    """Blocks of a skeleton, filled with values from disk.

    read(index)                           the block's tensors, or what they are decoded from, on the CPU, or a mapping
                                          that reads them; may run in a thread of its own
    fill(block, index, tensors, device)   puts them into the block; empties `tensors`
    fill_outer()                          fills everything outside the blocks
    ahead                                 read the next block while one is used
    values(block, tensors)                what `fill` would put into the block, each made when it is asked for; only of
                                          a model that is to be quantized
    phase                                 what the time for all that counts as, see lqer/phases.py
    """

    gives_copies: ClassVar[bool] = True

    read: Callable[[int], Any]
    fill: Callable[[nn.Module, int, Any, torch.device], None]
    fill_outer: Callable[[], None]
    ahead: bool
    values: Callable[[nn.Module, Any], Mapping[str, Tensor]] | None = None
    phase: str = "read"
    _outer_is_loaded: bool = field(default=False, init=False)

    def load_outer(self) -> None:
        if not self._outer_is_loaded:
            with phase(self.phase):
                self.fill_outer()
            self._outer_is_loaded = True

    def load_each(
        self, blocks: nn.ModuleList, indices: Sequence[int], device: torch.device
    ) -> Iterator[tuple[int, nn.Module]]:
        for index, tensors in self._read_all(indices):
            block = copy.deepcopy(blocks[index])
            self._fill(block, index, tensors, device)
            yield index, block
            _free(block)

    def values_of_each(
        self, blocks: nn.ModuleList, indices: Sequence[int]
    ) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        assert self.values is not None, "a checkpoint that is quantized already"
        for index, tensors in self._read_all(indices):
            yield index, self.values(blocks[index], tensors)

    def materialize(self, blocks: nn.ModuleList, device_of: Callable[[int], torch.device]) -> None:
        for index, tensors in self._read_all(range(len(blocks))):
            self._fill(blocks[index], index, tensors, device_of(index))

    def _read_all(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        if not self.ahead:
            for index in indices:
                yield index, self._read(index)
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
            pending = [reader.submit(self._read, index) for index in indices[:1]]
            for position, index in enumerate(indices):
                with phase(self.phase):
                    tensors = pending.pop().result()
                pending += [reader.submit(self._read, later) for later in indices[position + 1 : position + 2]]
                yield index, tensors
                del tensors

    def _read(self, index: int) -> Any:
        with phase(self.phase):
            return self.read(index)

    def _fill(self, block: nn.Module, index: int, tensors: Any, device: torch.device) -> None:
        with phase(self.phase):
            self.fill(block, index, tensors, device)
            block.to(device)


def _free(block: nn.Module) -> None:
    """Free a block's memory now: a caller's loop variable would keep it until the next block is filled."""
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


RESIDENT = Resident()


@dataclass(frozen=True)
class OpenedModel:
    """A model and its decoder blocks: `model` is in memory, or a skeleton that `loader` fills block by block.

    name: of the ModuleList `blocks` within the model. device: where blocks are run. offload: allocates hidden states.
    processor: the files of what makes a wrapper's inputs of images or sound, which a checkpoint keeps. gang: the
    processes that run the blocks on windows of their own.
    """

    model: PreTrainedModel
    name: str
    blocks: nn.ModuleList
    loader: BlockLoader
    device: torch.device
    offload: Offload
    processor: tuple[Path, ...] = ()
    gang: Gang = ALONE

    @classmethod
    def resident(cls, model: PreTrainedModel, device: torch.device, offload: Offload) -> OpenedModel:
        """Raises ModelError if the model has no blocks that can be quantized."""
        return cls(model, *find_blocks(model), RESIDENT, device, offload)

    def whole(self) -> PreTrainedModel:
        """The model with all its blocks, on its device."""
        self.loader.load_outer()
        self.loader.materialize(self.blocks, lambda index: self.device)
        nn.Module.to(self.model, self.device)
        return self.model
