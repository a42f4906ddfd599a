"""Recorders in the place of decoder blocks: how a model calls its blocks, without running them.

A recorder returns the hidden states that it is given, alone or in a tuple, whichever the model expects of its blocks.
What stands beside them in the tuple for other values tells which of these the model gives to later blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.models.calls import BlockCall, Returned

# (batch, tokens, hidden size), or (batch, tokens, streams, hidden size) of hyper-connections
HIDDEN_DIMENSIONS = (3, 4)
# Values that a block returns, such as hidden states, a recurrent state and attention weights.
MOST_RETURNED_VALUES = 3


class Recorder(nn.Module):
    """Replaces a block: records how it is called and returns the hidden states it is given."""

    def __init__(self, block: nn.Module):
        super().__init__()
        # Models read attributes such as `attention_type` off their blocks; a tuple keeps the block from being a child.
        self._block = (block,)
        self.returned_values = 0
        # Its number, where `Returned` stands for values beside the hidden states; else None does.
        self.number: int | None = None
        self.times_called = 0
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
        self.times_called += 1
        self.hidden, self.call = args[0], BlockCall(args[1:], kwargs)
        output = args[0] if self.answer is None else self.answer
        if not self.returned_values:
            return output
        places = range(1, self.returned_values)
        return (output, *(None if self.number is None else Returned(self.number, place) for place in places))


@contextmanager
def replaced(blocks: nn.ModuleList, recorders: Sequence[nn.Module]) -> Iterator[None]:
    """While active, recorders are in the place of the blocks."""
    originals = list(blocks)
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


def set_return_type(model: PreTrainedModel, recorders: list[Recorder], inputs: Mapping[str, Tensor]) -> None:
    """Let recorders return a tensor or a tuple, whichever the model expects of its blocks.

    Raises ModelError if the model changes the output of one block before it calls the next, or does not call each block
    once: running the blocks one after another would then not be what the model computes.
    """
    name = type(model).__name__
    changed, failure = False, Exception()
    for returned_values in range(MOST_RETURNED_VALUES + 1):
        for recorder in recorders:
            recorder.returned_values, recorder.times_called = returned_values, 0
        try:
            model.base_model(**inputs, use_cache=False)
        except ModelError:
            raise
        except Exception as error:  # whatever a model does with a tuple where it expects a tensor
            if recorders[0].times_called == 0:
                raise  # in the embedding, before any block was called
            failure = error
            continue
        _require_one_call_each(name, recorders)
        if all(_same(recorder.hidden, recorders[0].hidden) for recorder in recorders):
            _require_hidden_states(name, recorders[0].hidden, len(inputs["input_ids"]))
            _find_returned(model, recorders, inputs)
            return
        changed = True
    if not changed:
        raise failure
    raise ModelError(f"{name} changes the hidden states between its decoder blocks, which is not supported")


def _require_one_call_each(name: str, recorders: Sequence[Recorder]) -> None:
    for index, recorder in enumerate(recorders):
        if recorder.times_called != 1:
            raise ModelError(
                f"model: {name} calls decoder block {index} {recorder.times_called} times in one pass, which is not "
                "supported"
            )


def _require_hidden_states(name: str, hidden: Tensor, batch_size: int) -> None:
    shape = list(hidden.shape)
    if len(shape) not in HIDDEN_DIMENSIONS or shape[0] != batch_size:
        raise ModelError(
            f"model: the hidden states of {name} have shape {shape}, not (batch, tokens, size) or (batch, tokens, "
            "streams, size)"
        )


def _find_returned(model: PreTrainedModel, recorders: list[Recorder], inputs: Mapping[str, Tensor]) -> None:
    """Let recorders return what stands for their other values, where the model gives some of these to later blocks.

    Raises ModelError if it gives one to another block than the next.
    """
    if recorders[0].returned_values <= 1:
        return
    calls = [recorder.call for recorder in recorders]
    for number, recorder in enumerate(recorders):
        recorder.number = number
    try:
        model.base_model(**inputs, use_cache=False)
        taken = [(number, one) for number, recorder in enumerate(recorders) for one in recorder.call.returned]
    except Exception:  # whatever a model does with them where it expects None or a tensor
        taken = []
    if not taken:
        for recorder, call in zip(recorders, calls, strict=True):
            recorder.number, recorder.call = None, call
    for number, one in taken:
        if one.block != number - 1:
            raise ModelError(
                f"model: {type(model).__name__} calls decoder block {number} with what block {one.block} returns, "
                "which is supported of the block before it alone"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, where NaN equals NaN: broken weights are reported elsewhere, with the name of the linear."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
