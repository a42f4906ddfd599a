"""Walks the decoder blocks of a model, one at a time: the one loop that every stage and method shares.

A block is called with the arguments its own model calls it with. They are learnt by running the model once per batch
with every block replaced by a recorder that hands its input through: masks, positions and rotary tables do not depend
on the hidden states, so nothing else is needed, whatever the architecture.

Blocks come from a loader, which may read each one from disk; hidden states are stored by an `Offload`, in memory or on
disk. So memory grows with one block and one batch.

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.models.loaders import OpenedModel
from lqer.store.offload import Offload


@dataclass
class BlockCall:
    """How the model calls one block, apart from the hidden states in first place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """The hidden states of all windows on their way through the blocks, and how each block is called on them.

    states_WTD is allocated by the offload; the windows of a batch are contiguous. calls: per block and batch shape.
    calls_of_one: per block, how it is called on one window; what depends on the window's length alone has a
    leading dim of one there, and so serves a batch of any size.
    """

    states_WTD: Tensor
    batches: list[slice]
    offload: Offload
    calls: list[dict[torch.Size, BlockCall]]
    calls_of_one: list[BlockCall]
    blocks_return_tuples: bool

    def take(self, batch: int, device: torch.device) -> Tensor:
        """The states (B, T, D) of one batch, on the device."""
        return self.states_WTD[self.batches[batch]].to(device, non_blocking=True)

    def settled(self, device: torch.device) -> Tensor:
        """All the states, once the device has written them, for whoever reads them outside of its stream."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self.states_WTD

    def put(self, batch: int, hidden_BTD: Tensor) -> None:
        """The states of one batch, taken a block further."""
        # Ordered on the device's stream, as whoever takes it there next is.
        self.states_WTD[self.batches[batch]].copy_(hidden_BTD, non_blocking=True)
        self.offload.settle()


class BlockRun:
    """One decoder block with the hidden states that reach it; `forward` takes them through it."""

    def __init__(self, index: int, name: str, block: nn.Module, stream: Stream, device: torch.device):
        self.index, self.name, self.block, self.stream, self.device = index, name, block, stream, device

    def forward(self) -> None:
        """Run every batch through the block and store its outputs as the next block's inputs."""
        for batch in range(len(self.stream.batches)):
            self.stream.put(batch, self.output(batch))

    @torch.no_grad()
    def output(self, batch: int) -> Tensor:
        """What the block outputs on one batch (B, T, D), on its device; the stored hidden states stay its inputs."""
        hidden_BTD = self.stream.take(batch, self.device)
        call = self.stream.calls[self.index][hidden_BTD.shape]
        output = self.block(hidden_BTD, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output


def walk_blocks(opened: OpenedModel, windows_WT: Tensor, batch_size: int) -> Iterator[BlockRun]:
    """Visit the blocks in order with the hidden states of `windows_WT` (int64 token ids).

    The caller runs `visit.forward()` exactly once per visit. What surrounds the blocks is moved to the model's device
    for good, a block for the time of its visit. Hidden states are kept on the CPU in the model's dtype, on disk where
    the model's offload says.
    """
    stream = enter(opened, windows_WT.split(batch_size))
    yield from _visits(opened, stream)


def walk_to_logits(
    opened: OpenedModel,
    batches: Sequence[Tensor],
    progress: Callable[[Iterator[BlockRun]], Iterator[BlockRun]],
) -> Callable[[int], Tensor]:
    """Take all batches (B, T) through the blocks; returns what maps a batch's index to its logits (B, T, V).

    The logits are those of the model's own forward pass, which is run with the last block's outputs in its place.
    progress: wraps the visits, to show how far they are.
    """
    model, blocks, device = opened.model, opened.blocks, opened.device
    stream = enter(opened, batches)
    for visit in progress(_visits(opened, stream)):
        visit.forward()

    @torch.no_grad()
    def logits(batch: int) -> Tensor:
        recorders = [_Recorder(block) for block in blocks]
        for recorder in recorders:
            recorder.returns_tuple = stream.blocks_return_tuples
        recorders[-1].answer = stream.take(batch, device)
        with _standing_in(blocks, recorders):
            logits_BTV = model(input_ids=batches[batch].to(device), use_cache=False).logits
        stream.offload.settle()
        return logits_BTV

    return logits


def _visits(opened: OpenedModel, stream: Stream) -> Iterator[BlockRun]:
    for index, block in opened.loader.visits(opened.blocks, range(len(opened.blocks)), opened.device):
        yield BlockRun(index, f"{opened.name}.{index}", block, stream, opened.device)


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
def enter(opened: OpenedModel, batches: Sequence[Tensor]) -> Stream:
    """Embed every batch (B, T) and record, per block and batch shape, how the model calls the block.

    All windows have the same length. Raises ModelError for a model that cannot be walked.
    """
    opened.loader.load_outer()
    model, blocks, device, offload = opened.model, opened.blocks, opened.device, opened.offload
    recorders = [_Recorder(block) for block in blocks]
    calls: list[dict[torch.Size, BlockCall]] = [{} for _ in blocks]
    ends = list(itertools.accumulate(len(ids_BT) for ids_BT in batches))
    stream: Stream | None = None
    with _standing_in(blocks, recorders):
        nn.Module.to(model, device)
        _learn_what_blocks_return(model, recorders, batches[0][:1].to(device))
        calls_of_one = [recorder.call for recorder in recorders]
        for batch, ids_BT in enumerate(batches):
            model.base_model(input_ids=ids_BT.to(device), use_cache=False)
            hidden_BTD = recorders[0].hidden
            if stream is None:
                states_WTD = offload.empty((ends[-1], *hidden_BTD.shape[1:]), hidden_BTD.dtype, hidden_BTD.is_cuda)
                slices = [slice(end - len(ids), end) for ids, end in zip(batches, ends, strict=True)]
                stream = Stream(states_WTD, slices, offload, calls, calls_of_one, recorders[0].returns_tuple)
            stream.put(batch, hidden_BTD)
            for of_block, recorder in zip(calls, recorders, strict=True):
                of_block.setdefault(hidden_BTD.shape, recorder.call)
    assert stream is not None, "there is at least one batch"
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
