"""Runs the hidden states of a text through the decoder blocks of a model, one block at a time.

A block is called with the arguments its own model calls it with. They are found by running the model once per batch
with every block replaced by a recorder that returns its input: masks, positions and rotary tables do not depend on the
hidden states, so nothing else is needed, whatever the architecture.

Blocks come from a loader, which may read each one from disk; hidden states are allocated by an `Offload`, in memory or
on disk. So memory grows with one block and one batch.

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.models.loaders import OpenedModel
from lqer.nn.attention import attention_as
from lqer.store.offload import Offload


@dataclass
class BlockCall:
    """The arguments of a call of one block after the hidden states, its first positional argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class HiddenStates:
    """The hidden states of all windows between two blocks, and the arguments that each block is called with.

    states_WTD: in the model's dtype, on the CPU, from the offload; the windows of a batch are contiguous.
    calls: per block, the call for each shape of a batch.
    calls_of_one: per block, the call for a single window; arguments that depend on the window's length alone have a
        leading dimension of one there, which broadcasts over a batch of any size.
    """

    states_WTD: Tensor
    batches: list[slice]
    offload: Offload
    calls: list[dict[torch.Size, BlockCall]]
    calls_of_one: list[BlockCall]
    blocks_return_tuples: bool

    def load(self, batch: int, device: torch.device) -> Tensor:
        """The states (B, T, D) of one batch, on the device."""
        return self.states_WTD[self.batches[batch]].to(device, non_blocking=True)

    def store(self, batch: int, hidden_BTD: Tensor) -> None:
        """Replace the states of one batch."""
        # Ordered on the device's stream, on which `load` reads them too.
        self.states_WTD[self.batches[batch]].copy_(hidden_BTD, non_blocking=True)
        self.offload.release_pages()

    def synchronized(self, device: torch.device) -> Tensor:
        """All states (W, T, D), safe to read from any thread or stream: the device has finished writing them."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self.states_WTD

    def empty_like(self) -> HiddenStates:
        """A second buffer of undefined states for the same windows and calls."""
        pinned = self.states_WTD.is_pinned()
        return replace(self, states_WTD=self.offload.empty(self.states_WTD.shape, self.states_WTD.dtype, pinned))


class BlockRun:
    """One decoder block, on `device`, with the hidden states that are its inputs.

    attention: the name of the attention function, in transformers' registry, that the block runs with; None for that of
    its model.
    """

    def __init__(
        self,
        index: int,
        name: str,
        block: nn.Module,
        hidden: HiddenStates,
        device: torch.device,
        attention: str | None = None,
    ):
        self.index, self.name, self.block, self.hidden, self.device = index, name, block, hidden, device
        self._attention = attention

    @torch.no_grad()
    def output(self, batch: int) -> Tensor:
        """The block's output on one batch (B, T, D), on its device; the stored hidden states stay its inputs."""
        hidden_BTD = self.hidden.load(batch, self.device)
        call = self.hidden.calls[self.index][hidden_BTD.shape]
        with nullcontext() if self._attention is None else attention_as(self.block, self._attention):
            output = self.block(hidden_BTD, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def forward(self, to: HiddenStates | None = None) -> None:
        """Run every batch through the block; its outputs replace its inputs, or are stored in `to`."""
        outputs = self.hidden if to is None else to
        for batch in range(len(self.hidden.batches)):
            outputs.store(batch, self.output(batch))

    def with_block(self, block: nn.Module) -> BlockRun:
        """The same inputs for another block in its place."""
        return BlockRun(self.index, self.name, block, self.hidden, self.device, self._attention)


def walk_blocks(opened: OpenedModel, windows_WT: Tensor, batch_size: int) -> Iterator[BlockRun]:
    """The blocks in order, each with the hidden states of `windows_WT` (int64 token ids) that reach it.

    The caller runs each block forward exactly once before it asks for the next one. Everything outside the blocks is
    moved to the model's device for good, a block until the next one is asked for. Hidden states are stored on the CPU
    in the model's dtype, on disk where the model's offload says so.
    """
    hidden = embed(opened, windows_WT.split(batch_size))
    yield from _block_runs(opened, hidden)


def walk_to_logits(
    opened: OpenedModel,
    batches: Sequence[Tensor],
    progress: Callable[[Iterator[BlockRun]], Iterator[BlockRun]],
) -> Callable[[int], Tensor]:
    """Run all batches (B, T) through the blocks; returns a function from a batch's index to its logits (B, T, V).

    The logits are those of the model's own forward pass, which is run with the last block's outputs in its place.
    progress: wraps the iterator over the blocks, such as tqdm.
    """
    model, blocks, device = opened.model, opened.blocks, opened.device
    hidden = embed(opened, batches)
    for run in progress(_block_runs(opened, hidden)):
        run.forward()

    @torch.no_grad()
    def logits(batch: int) -> Tensor:
        recorders = [_Recorder(block) for block in blocks]
        for recorder in recorders:
            recorder.returns_tuple = hidden.blocks_return_tuples
        recorders[-1].answer = hidden.load(batch, device)
        with _replaced(blocks, recorders):
            logits_BTV = model(input_ids=batches[batch].to(device), use_cache=False).logits
        hidden.offload.release_pages()
        return logits_BTV

    return logits


def _block_runs(opened: OpenedModel, hidden: HiddenStates) -> Iterator[BlockRun]:
    for index, block in opened.loader.load_each(opened.blocks, range(len(opened.blocks)), opened.device):
        yield BlockRun(index, f"{opened.name}.{index}", block, hidden, opened.device)


class _Recorder(nn.Module):
    """Replaces a block: records how it is called and returns the hidden states it is given."""

    def __init__(self, block: nn.Module):
        super().__init__()
        # Models read attributes such as `attention_type` off their blocks; a tuple keeps the block from being a child.
        self._block = (block,)
        self.returns_tuple = False
        self.called = False
        # Returned instead of the given states, for a block that has been run already.
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
            raise ModelError(
                f"{type(self._block[0]).__name__} must receive hidden_states as its first positional argument"
            )
        self.called = True
        self.hidden, self.call = args[0], BlockCall(args[1:], kwargs)
        output = args[0] if self.answer is None else self.answer
        return (output,) if self.returns_tuple else output


@contextmanager
def _replaced(blocks: nn.ModuleList, recorders: list[_Recorder]) -> Iterator[None]:
    originals = list(blocks)
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


@torch.no_grad()
def embed(opened: OpenedModel, batches: Sequence[Tensor]) -> HiddenStates:
    """Embed every batch (B, T) and record, per block and batch shape, how the model calls the block.

    All windows have the same length. Raises ModelError for a model whose blocks cannot be run one at a time.
    """
    opened.loader.load_outer()
    model, blocks, device, offload = opened.model, opened.blocks, opened.device, opened.offload
    recorders = [_Recorder(block) for block in blocks]
    calls: list[dict[torch.Size, BlockCall]] = [{} for _ in blocks]
    ends = list(itertools.accumulate(len(ids_BT) for ids_BT in batches))
    hidden: HiddenStates | None = None
    with _replaced(blocks, recorders):
        nn.Module.to(model, device)
        _set_return_type(model, recorders, batches[0][:1].to(device))
        calls_of_one = [recorder.call for recorder in recorders]
        for batch, ids_BT in enumerate(batches):
            model.base_model(input_ids=ids_BT.to(device), use_cache=False)
            hidden_BTD = recorders[0].hidden
            if hidden is None:
                states_WTD = offload.empty((ends[-1], *hidden_BTD.shape[1:]), hidden_BTD.dtype, hidden_BTD.is_cuda)
                slices = [slice(end - len(ids), end) for ids, end in zip(batches, ends, strict=True)]
                hidden = HiddenStates(states_WTD, slices, offload, calls, calls_of_one, recorders[0].returns_tuple)
            hidden.store(batch, hidden_BTD)
            for of_block, recorder in zip(calls, recorders, strict=True):
                of_block.setdefault(hidden_BTD.shape, recorder.call)
    assert hidden is not None, "there is at least one batch"
    return hidden


def _set_return_type(model: PreTrainedModel, recorders: list[_Recorder], ids_BT: Tensor) -> None:
    """Let recorders return a tuple or a tensor, whichever the model expects of its blocks.

    Raises ModelError if the model changes the output of one block before it calls the next: running the blocks one
    after another would then not be what the model computes.
    """
    for returns_tuple in (False, True):
        for recorder in recorders:
            recorder.returns_tuple = returns_tuple
        try:
            model.base_model(input_ids=ids_BT, use_cache=False)
        except (IndexError, RuntimeError, TypeError):
            if not recorders[0].called:
                raise  # in the embedding, before any block was called
            continue
        if all(_same(recorder.hidden, recorders[0].hidden) for recorder in recorders):
            return
    raise ModelError(
        f"{type(model).__name__} changes the hidden states between its decoder blocks, which is not supported"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, where NaN equals NaN: broken weights are reported elsewhere, with the name of the linear."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
