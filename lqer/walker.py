"""Walks the decoder blocks of a model, one at a time: the one loop that every stage and method shares.

A block is called with the arguments its own model calls it with. They are learnt by running the model once per batch
with every block replaced by a recorder that hands its input through: masks, positions and rotary tables do not depend
on the hidden states, so nothing else is needed, whatever the architecture.

Blocks come from a loader, which may read each from disk for its visit; hidden states lie where a `Spill` puts them. So
memory grows with one block and one batch.

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.blocks import HELD, BlockLoader, OpenedModel
from lqer.errors import ModelError
from lqer.spill import Spill


@dataclass
class BlockCall:
    """How the model calls one block, apart from the hidden states in first place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """The hidden states of every batch on their way through the blocks, and how each block is called on them."""

    spill: Spill
    hidden_BTD: list[Tensor] = field(default_factory=list)
    calls: list[dict[torch.Size, BlockCall]] = field(default_factory=list)
    blocks_return_tuples: bool = False

    def add(self, hidden_BTD: Tensor) -> None:
        place = self.spill.empty(hidden_BTD.shape, hidden_BTD.dtype, pinned=hidden_BTD.is_cuda)
        self.hidden_BTD.append(place.copy_(hidden_BTD))

    def replace(self, batch: int, hidden_BTD: Tensor) -> None:
        """The states of one batch, taken a block further. What is on disk or page-locked is overwritten in place."""
        place = self.hidden_BTD[batch]
        if place.is_pinned() or self.spill.is_on_disk(place):
            # Ordered on the device's stream, as whoever reads it there next is.
            place.copy_(hidden_BTD, non_blocking=True)
        else:
            self.hidden_BTD[batch] = hidden_BTD.to(place.device)
        self.spill.settle()


class BlockVisit:
    """One decoder block with the hidden states that reach it; `forward` takes them through it."""

    def __init__(self, index: int, name: str, block: nn.Module, stream: Stream, device: torch.device):
        self.index, self.name, self.block = index, name, block
        self._stream, self._device = stream, device

    @torch.no_grad()
    def forward(self, before_batch: Callable[[int], None] = lambda first_window: None) -> None:
        """Run every batch through the block and keep its outputs as the next block's inputs.

        `before_batch` is told the index of each batch's first window.
        """
        first_window = 0
        for i, hidden_BTD in enumerate(self._stream.hidden_BTD):
            before_batch(first_window)
            call = self._stream.calls[self.index][hidden_BTD.shape]
            output = self.block(hidden_BTD.to(self._device, non_blocking=True), *call.args, **call.kwargs)
            self._stream.replace(i, output[0] if isinstance(output, tuple) else output)
            first_window += len(hidden_BTD)


def walk_blocks(
    model: PreTrainedModel,
    name: str,
    blocks: nn.ModuleList,
    windows_WT: Tensor,
    batch_size: int,
    device: torch.device,
    loader: BlockLoader = HELD,
    spill: Spill | None = None,
) -> Iterator[BlockVisit]:
    """Visit the blocks in order with the hidden states of `windows_WT` (int64 token ids).

    The caller runs `visit.forward()` exactly once per visit. What surrounds the blocks is moved to `device` for good, a
    block for the time of its visit. Hidden states are kept on the CPU in the model's dtype, on disk where `spill` says.
    """
    loader.complete()
    stream = _enter(model, blocks, windows_WT.split(batch_size), device, spill or Spill())
    yield from _visits(name, blocks, stream, device, loader)


def walk_to_logits(
    opened: OpenedModel,
    batches: Sequence[Tensor],
    progress: Callable[[Iterator[BlockVisit]], Iterator[BlockVisit]],
) -> Callable[[int], Tensor]:
    """Take all batches (B, T) through the blocks; returns what maps a batch's index to its logits (B, T, V).

    The logits are those of the model's own forward pass, which is run with the last block's outputs in its place.
    progress: wraps the visits, to show how far they are.
    """
    model, name, blocks, device, spill = opened.model, opened.name, opened.blocks, opened.device, opened.spill
    opened.loader.complete()
    stream = _enter(model, blocks, batches, device, spill)
    for visit in progress(_visits(name, blocks, stream, device, opened.loader)):
        visit.forward()

    @torch.no_grad()
    def logits(batch: int) -> Tensor:
        recorders = [_Recorder(block) for block in blocks]
        for recorder in recorders:
            recorder.returns_tuple = stream.blocks_return_tuples
        recorders[-1].answer = stream.hidden_BTD[batch].to(device, non_blocking=True)
        with _standing_in(blocks, recorders):
            logits_BTV = model(input_ids=batches[batch].to(device), use_cache=False).logits
        spill.settle()
        return logits_BTV

    return logits


def _visits(
    name: str, blocks: nn.ModuleList, stream: Stream, device: torch.device, loader: BlockLoader
) -> Iterator[BlockVisit]:
    for index, block in loader.visits(blocks, range(len(blocks)), device):
        yield BlockVisit(index, f"{name}.{index}", block, stream, device)


class _Recorder(nn.Module):
    """Stands in for a block: records how it is called and hands the hidden states through."""

    def __init__(self, block: nn.Module):
        super().__init__()
        # Models read attributes such as `attention_type` off their blocks; a tuple keeps the block from being a child.
        self._block = (block,)
        self.returns_tuple = False
        self.called = False
        # Returned in place of the states that come in, where the block has been walked already.
        self.answer: Tensor | None = None
        self.hidden: Tensor
        self.call: BlockCall

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            raise ModelError(f"{type(self._block[0]).__name__} is not called with its hidden states in first place")
        self.called = True
        self.hidden, self.call = args[0], BlockCall(args[1:], kwargs)
        output = args[0] if self.answer is None else self.answer
        return (output,) if self.returns_tuple else output


@contextmanager
def _standing_in(blocks: nn.ModuleList, recorders: list[_Recorder]) -> Iterator[None]:
    originals = list(blocks)
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


@torch.no_grad()
def _enter(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[Tensor], device: torch.device, spill: Spill
) -> Stream:
    """Embed every batch and record, per block and batch shape, how the model calls the block."""
    recorders = [_Recorder(block) for block in blocks]
    stream = Stream(spill, calls=[{} for _ in blocks])
    with _standing_in(blocks, recorders):
        nn.Module.to(model, device)
        _learn_what_blocks_return(model, recorders, batches[0][:1].to(device))
        stream.blocks_return_tuples = recorders[0].returns_tuple
        for ids_BT in batches:
            model.base_model(input_ids=ids_BT.to(device), use_cache=False)
            hidden_BTD = recorders[0].hidden
            stream.add(hidden_BTD)
            for calls, recorder in zip(stream.calls, recorders, strict=True):
                calls.setdefault(hidden_BTD.shape, recorder.call)
            spill.settle()
    return stream


def _learn_what_blocks_return(model: PreTrainedModel, recorders: list[_Recorder], ids_BT: Tensor) -> None:
    """Find out whether the model expects a tensor or a tuple back from a block.

    Raises ModelError if the model does not hand one block's output to the next unchanged: a walk would then not be what
    the model computes.
    """
    for returns_tuple in (False, True):
        for recorder in recorders:
            recorder.returns_tuple = returns_tuple
        try:
            model.base_model(input_ids=ids_BT, use_cache=False)
        except (IndexError, RuntimeError, TypeError):
            if not recorders[0].called:
                raise  # in the embedding: nothing to do with what blocks return
            continue
        if all(_same(recorder.hidden, recorders[0].hidden) for recorder in recorders):
            return
    raise ModelError(
        f"{type(model).__name__} changes the hidden states between its blocks: they cannot be walked alone"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, where NaN equals NaN: broken weights are reported by whoever looks at the numbers."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
