"""Walks the decoder blocks of a model, one at a time: the one loop that every stage and method shares.

A block is called with the arguments its own model calls it with. They are learnt by running the model once per batch
with every block replaced by a recorder that hands its input through: masks, positions and rotary tables do not depend
on the hidden states, so nothing else is needed, whatever the architecture.

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError


@dataclass
class BlockCall:
    """How the model calls one block, apart from the hidden states in first place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """The hidden states of every batch on their way through the blocks, and how each block is called on them."""

    hidden_BTD: list[Tensor]
    calls: list[dict[torch.Size, BlockCall]] = field(default_factory=list)


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
        self.block.to(self._device)
        first_window = 0
        for i, hidden_BTD in enumerate(self._stream.hidden_BTD):
            before_batch(first_window)
            call = self._stream.calls[self.index][hidden_BTD.shape]
            output = self.block(hidden_BTD.to(self._device), *call.args, **call.kwargs)
            output_BTD = output[0] if isinstance(output, tuple) else output
            self._stream.hidden_BTD[i] = output_BTD.to(hidden_BTD.device)
            first_window += len(hidden_BTD)


def walk_blocks(
    model: PreTrainedModel, name: str, blocks: nn.ModuleList, windows_WT: Tensor, batch_size: int, device: torch.device
) -> Iterator[BlockVisit]:
    """Visit the blocks in order with the hidden states of `windows_WT` (int64 token ids).

    The caller runs `visit.forward()` exactly once per visit. What surrounds the blocks is moved to `device` for good, a
    block for the time of its visit. Hidden states are kept on the CPU in the model's dtype.
    """
    stream = _enter(model, blocks, windows_WT.split(batch_size), device)
    for index, block in enumerate(blocks):
        home = next(block.parameters()).device
        yield BlockVisit(index, f"{name}.{index}", block, stream, device)
        block.to(home)


class _Recorder(nn.Module):
    """Stands in for a block: records how it is called and hands the hidden states through."""

    def __init__(self, block: nn.Module):
        super().__init__()
        # Models read attributes such as `attention_type` off their blocks; a tuple keeps the block from being a child.
        self._block = (block,)
        self.returns_tuple = False
        self.called = False
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
        return (args[0],) if self.returns_tuple else args[0]


@torch.no_grad()
def _enter(model: PreTrainedModel, blocks: nn.ModuleList, batches: tuple[Tensor, ...], device: torch.device) -> Stream:
    """Embed every batch and record, per block and batch shape, how the model calls the block."""
    originals = list(blocks)
    recorders = [_Recorder(block) for block in originals]
    stream = Stream([], [{} for _ in originals])
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        nn.Module.to(model, device)
        _learn_what_blocks_return(model, recorders, batches[0][:1].to(device))
        for ids_BT in batches:
            model.base_model(input_ids=ids_BT.to(device), use_cache=False)
            hidden_BTD = recorders[0].hidden
            stream.hidden_BTD.append(hidden_BTD.cpu())
            for calls, recorder in zip(stream.calls, recorders, strict=True):
                calls.setdefault(hidden_BTD.shape, recorder.call)
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
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
