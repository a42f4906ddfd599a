"""Compiles the kernels of an evaluation while the model is quantized, which for a new format or shape takes seconds.

As soon as one block is written, a thread loads it as the evaluation will load all of them, and runs the first batch of
windows through a model of that block alone. What Triton has compiled by then stays in this process, and in its
cache on disk.

Shapes: W windows, B windows of a batch, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor, nn

from lqer.checkpoint.load import fill_block, kernels_for
from lqer.checkpoint.siblings import join_siblings
from lqer.models.loaders import OpenedModel
from lqer.models.reading import read_file
from lqer.models.source import ModelSource
from lqer.models.streaming import open_streamed
from lqer.nn.attention import quantize_attention, quantized_attention
from lqer.run.evaluations import tokens_of_calls
from lqer.run.preflight import CheckedRun
from lqer.store.names import BLOCK, block_file, layers_file
from lqer.store.offload import Offload
from lqer.store.store import partial_path

log = logging.getLogger(__name__)

NOT_REHEARSED = "kernels were not compiled ahead of the evaluation: %s"
# Between two looks whether a block is there.
SECONDS = 0.1
# How long a thread that computes in Python keeps the interpreter's lock from another one that asks for it, in seconds.
TURN = 1e-4


@dataclass(frozen=True)
class Rehearsal:
    """An evaluation by kernels: the original model, what the checkpoint says of attention, and the first batch (B, T).

    checkpoint: the folder where its blocks will be.
    """

    source: ModelSource
    checkpoint: Path
    attention: Mapping[str, Any] | None
    device: torch.device
    dtype: torch.dtype
    ids_BT: Tensor

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run it in a thread while the body runs. Whatever fails in it is left to the evaluation, which says so."""
        over, opened = Event(), self.opened()
        if opened is None:
            yield
            return
        thread = Thread(target=self._wait_and_run, args=(opened, over), name="rehearsal", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            over.set()
            raise
        over.set()
        thread.join()

    def opened(self) -> OpenedModel | None:
        """The model without values; None where it cannot be read block by block.

        To be called before the thread begins: transformers builds a model under its dtype as torch's default, which all
        threads share.
        """
        try:
            return open_streamed(self.source, self.dtype, self.device, Offload())
        except Exception as error:  # whatever libraries raise
            log.debug(NOT_REHEARSED, error)
            return None

    def _wait_and_run(self, opened: OpenedModel, over: Event) -> None:
        while (index := self._written()) is None:
            if over.wait(SECONDS):
                return
        try:
            with short_turns():
                self.run(opened, index)
        except Exception as error:  # whatever libraries raise
            log.debug(NOT_REHEARSED, error)

    def _written(self) -> int | None:
        """A block that is there; None as long as there is none."""
        numbers = sorted(int(file.stem.removeprefix(BLOCK)) for file in self.checkpoint.glob(f"{BLOCK}*"))
        return numbers[0] if numbers else None

    def run(self, opened: OpenedModel, index: int) -> Tensor:
        """The logits (B, T, V) of the model with that block alone."""
        if self.attention is not None:
            quantize_attention(opened.model, quantized_attention(self.attention))
        del opened.blocks[index + 1 :], opened.blocks[:index]
        opened.loader.load_outer()
        prefix = f"{opened.name}.{index}."
        stored = read_file(self.checkpoint / block_file(index), pinned=self.device.type == "cuda")
        rows = json.loads((self.checkpoint / layers_file(index)).read_text(encoding="utf-8"))
        tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        entries = {row["name"].removeprefix(prefix): row["entry"] for row in rows}
        with kernels_for((self.ids_BT.numel(),), self.device):
            fill_block(opened.blocks[0], tensors, entries, self.device, self.dtype, "triton")
            nn.Module.to(opened.model, self.device)
            join_siblings(opened.model, opened.blocks)
        with torch.inference_mode():
            return opened.model(input_ids=self.ids_BT.to(self.device), use_cache=False).logits


@contextmanager
def short_turns() -> Iterator[None]:
    """Within, threads that compute in Python give way after TURN instead of Python's 5 ms.

    Each operation that the main thread gives a GPU gives the lock away, and would wait so long for it beside a compiler
    in Python: a hundred waits of 0.2 ms beside another thread took 0.77 s on a CPU, 0.10 s within, 0.03 s alone.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def rehearsed(checked: CheckedRun) -> AbstractContextManager[None]:
    """The context in which a run is quantized: with a rehearsal beside it, where that helps."""
    rehearsal = _rehearsal_of(checked)
    return nullcontext() if rehearsal is None else rehearsal.beside()


def _rehearsal_of(checked: CheckedRun) -> Rehearsal | None:
    """What can be compiled for the evaluation while the model is quantized; None where it is not evaluated by kernels,
    its blocks are there already, or calls of several sizes will come.
    """
    context, stage, store = checked.context, checked.experiment.quantize, checked.store
    evaluation, texts = context.config.evaluation, checked.texts.evaluation
    windows_WT = texts[0].windows_WT if texts else None
    is_whole = context.device.type == "cuda" and context.backend == "triton" and not evaluation.blockwise
    if windows_WT is None or not is_whole or not tokens_of_calls(evaluation) or stage.find(store) is not None:
        return None
    assert evaluation.perplexity is not None
    checkpoint = partial_path(store.path(stage.name, stage.key))
    batch = windows_WT[: evaluation.perplexity.batch_size]
    return Rehearsal(context.source, checkpoint, stage.attention, context.device, context.dtype, batch)
