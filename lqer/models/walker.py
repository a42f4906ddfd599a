"""Runs the hidden states of a text through the decoder blocks of a model, one block at a time.

A block is called with the arguments its own model calls it with. They are found by running the model once per batch
with every block replaced by a recorder that returns its input: masks, positions and rotary tables do not depend on the
hidden states, so nothing else is needed, whatever the architecture. Arguments that differ between batches of one shape,
such as embeddings of the tokens for each block, are stored per batch.

Blocks come from a loader, which may read each one from disk; hidden states are in memory or on disk, or on a GPU that
has much room for them (`hidden.py`). So memory grows with one block and one batch.

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.models.calls import BlockCall, Comparison, Left, RecordedCalls, returned_by
from lqer.models.files import reported_as
from lqer.models.hidden import HiddenStates, new_states
from lqer.models.loaders import OpenedModel
from lqer.models.recorder import Recorder, replaced, set_return_type
from lqer.nn.attention import attention_as
from lqer.phases import in_phase
from lqer.statistics import Gang


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
        # For each batch, what the block and those before it left for later ones when it was run last.
        self._left: dict[int, Left] = {}

    @in_phase("forward")
    @torch.no_grad()
    def output(self, batch: int) -> Tensor:
        """The block's output on one batch (B, T, D), on its device; the stored hidden states stay its inputs.

        Raises ModelError if the block returns no hidden states.
        """
        return self.differentiable_output(batch, self.hidden.load(batch, self.device))

    def differentiable_output(self, batch: int, hidden_BTD: Tensor) -> Tensor:
        """The output on hidden states in place of the batch's own, with a gradient where the caller enables it."""
        recorded = self.hidden.calls[self.index][batch]
        call = recorded.to(self.device)
        call.put(self.hidden.left.get(batch, {}), self.device)
        with nullcontext() if self._attention is None else attention_as(self.block, self._attention):
            output = self.block(hidden_BTD, *call.args, **call.kwargs)
        values = output if isinstance(output, tuple | list) else (output,)
        output_BTD = values[0]
        if not isinstance(output_BTD, Tensor) or output_BTD.shape != hidden_BTD.shape:
            raise ModelError(f"model: {self.name} does not return hidden states of the shape it receives")
        self._left[batch] = call.left(recorded)
        if self.index + 1 < len(self.hidden.calls):
            self._left[batch] |= returned_by(values, self.hidden.calls[self.index + 1][batch])
        return output_BTD

    def keep(self, batch: int, output_BTD: Tensor, to: HiddenStates | None = None) -> None:
        """Put the output that was computed last for a batch in the place of its input, or into `to`."""
        outputs = self.hidden if to is None else to
        outputs.store(batch, output_BTD)
        outputs.left[batch] = self._left.pop(batch)

    @in_phase("forward")
    def forward(self, to: HiddenStates | None = None) -> None:
        """Run every batch through the block; its outputs replace its inputs, or are stored in `to`."""
        for batch in range(len(self.hidden.batches)):
            self.keep(batch, self.output(batch), to)

    def with_block(self, block: nn.Module) -> BlockRun:
        """The same inputs for another block in its place."""
        return BlockRun(self.index, self.name, block, self.hidden, self.device, self._attention)


def walk_blocks(
    opened: OpenedModel,
    windows_WT: Tensor,
    batch_size: int,
    blocks: int | None = None,
    beside: Sequence[Mapping[str, Tensor]] = (),
) -> Iterator[BlockRun]:
    """The blocks in order, each with the hidden states of `windows_WT` (int64 token ids) that reach it.

    blocks: how many, the first ones; all by default. beside: as in `embed`.

    The caller runs each block forward exactly once before it asks for the next one. Everything outside the blocks is
    moved to the model's device for good, a block until the next one is asked for. Hidden states are kept in the model's
    dtype, near the blocks.
    """
    hidden = embed(opened, windows_WT.split(batch_size), beside, near=True)
    yield from _block_runs(opened, hidden, blocks)


def walk_to_logits(
    opened: OpenedModel,
    batches: Sequence[Tensor],
    progress: Callable[[Iterator[BlockRun]], Iterator[BlockRun]],
) -> Callable[[int], Tensor]:
    """Run all batches (B, T) through the blocks; returns a function from a batch's index to its logits (B, T, V).

    Batches may have different lengths T. The logits are those of the model's own forward pass, which is run with the
    last block's outputs in its place. progress: wraps the iterator over the blocks, such as tqdm.
    """
    of_length: dict[int, list[int]] = {}
    for batch, ids_BT in enumerate(batches):
        of_length.setdefault(ids_BT.shape[1], []).append(batch)
    groups = [(numbers, embed(opened, [batches[batch] for batch in numbers])) for numbers in of_length.values()]
    first, *others = [hidden for _, hidden in groups]
    for run in progress(_block_runs(opened, first)):
        run.forward()
        for hidden in others:
            BlockRun(run.index, run.name, run.block, hidden, run.device).forward()
    places = {batch: (hidden, place) for numbers, hidden in groups for place, batch in enumerate(numbers)}

    @torch.no_grad()
    def logits(batch: int) -> Tensor:
        hidden, place = places[batch]
        states_BTD = hidden.load(place, opened.device)
        logits_BTV = logits_of_states(opened, batches[batch], states_BTD, hidden.returned_values)
        hidden.offload.release_pages()
        return logits_BTV

    return logits


def logits_of_states(opened: OpenedModel, ids_BT: Tensor, states_BTD: Tensor, returned_values: int) -> Tensor:
    """The logits (B, T, V) of the model's own forward pass with the last block's outputs replaced by `states_BTD`.

    returned_values: by each of the model's blocks, as in HiddenStates.
    """
    recorders = [Recorder(block) for block in opened.blocks]
    for recorder in recorders:
        recorder.returned_values = returned_values
    recorders[-1].answer = states_BTD
    with replaced(opened.blocks, recorders):
        return opened.model(input_ids=ids_BT.to(opened.device), use_cache=False).logits


def _block_runs(opened: OpenedModel, hidden: HiddenStates, blocks: int | None = None) -> Iterator[BlockRun]:
    indices = range(len(opened.blocks) if blocks is None else blocks)
    for index, block in opened.loader.load_each(opened.blocks, indices, opened.device):
        refuse_non_finite(block.named_parameters(f"{opened.name}.{index}"))
        yield BlockRun(index, f"{opened.name}.{index}", block, hidden, opened.device)


@torch.no_grad()
def run_one_block(opened: OpenedModel, index: int, ids_BT: Tensor, returned_values: int) -> Tensor:
    """What the model itself passes to the block after `index` when that block alone is run, the others skipped."""
    recorders = [Recorder(block) for block in opened.blocks]
    for recorder in recorders:
        recorder.returned_values = returned_values
    modules: list[nn.Module] = [*recorders]
    modules[index] = opened.blocks[index]
    with replaced(opened.blocks, modules):
        opened.model.base_model(input_ids=ids_BT, use_cache=False)
    return recorders[index + 1].hidden


@in_phase("forward")
@torch.no_grad()
def embed(
    opened: OpenedModel, batches: Sequence[Tensor], beside: Sequence[Mapping[str, Tensor]] = (), near: bool = False
) -> HiddenStates:
    """Embed every batch (B, T) and record, per block and batch, how the model calls the block.

    beside: by window, what the model is given beside token ids; tensors of a batch's windows are joined. near: as in
    `new_states`, but for a gang, whose ranks exchange states on the CPU.

    Each rank of a gang embeds batches of its own. All windows have the same length. Raises ModelError for a model
    whose blocks cannot be run one at a time, and for parameters outside the blocks that are not finite.
    """
    opened.loader.load_outer()
    inside = f"{opened.name}."
    refuse_non_finite((name, tensor) for name, tensor in opened.model.named_parameters() if not name.startswith(inside))
    model, blocks, device, offload = opened.model, opened.blocks, opened.device, opened.offload
    recorders = [Recorder(block) for block in blocks]
    recorded = [RecordedCalls(offload) for _ in blocks]
    starts = list(itertools.accumulate((len(ids_BT) for ids_BT in batches), initial=0))
    gang, ours = opened.gang, opened.gang.share(range(len(batches)))
    first_window, windows = starts[ours[0]], starts[ours[-1] + 1] - starts[ours[0]]
    slices = [slice(starts[batch] - first_window, starts[batch + 1] - first_window) for batch in ours]
    hidden: HiddenStates | None = None
    with replaced(blocks, recorders), reported_as(f"model: {type(model).__name__} cannot be run block by block"):
        nn.Module.to(model, device)
        set_return_type(model, recorders, _inputs(model, batches[0][:1], beside[:1], device))
        of_one = [recorder.call for recorder in recorders]
        for place, batch in enumerate(ours):
            given = beside[starts[batch] : starts[batch + 1]]
            model.base_model(**_inputs(model, batches[batch], given, device), use_cache=False)
            hidden_BTD = recorders[0].hidden
            if hidden is None:
                shape, here = (windows, *hidden_BTD.shape[1:]), hidden_BTD.device
                states_WTD = new_states(shape, hidden_BTD.dtype, here, offload, near and gang.size == 1)
                returned_values = recorders[0].returned_values
                hidden = HiddenStates(
                    states_WTD, slices, offload, [], [], returned_values, gang=gang, first_window=first_window
                )
            hidden.store(place, hidden_BTD)
            compared = Comparison()
            for record, recorder in zip(recorded, recorders, strict=True):
                record.add(recorder.call, hidden_BTD.shape, compared)
    assert hidden is not None, "there is at least one batch"
    hidden.calls = [record.calls for record in recorded]
    general = [record.general(call) for record, call in zip(recorded, of_one, strict=True)]
    hidden.calls_of_one = _alike_on_all_ranks(general, gang)
    return hidden


def _alike_on_all_ranks(calls: Sequence[BlockCall | None], gang: Gang) -> list[BlockCall | None]:
    """The calls of one window; which of their arguments differ between windows is what the first rank has found.

    Another rank may have the last batch alone, of a single window, and could not tell.
    """
    per_window = gang.of_first([None if call is None else call.per_window for call in calls])
    return [
        None if call is None or found is None else replace(call, per_window=found)
        for call, found in zip(calls, per_window, strict=True)
    ]


def refuse_non_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ModelError, naming the parameter and its dtype, if one holds NaN or infinities."""
    # Read together: each read waits for a GPU, and a block of experts has many parameters.
    dtypes, are_finite = dict[str, torch.dtype](), list[Tensor]()
    for name, parameter in parameters:
        if not parameter.is_meta and parameter.is_floating_point():
            dtypes[name] = parameter.dtype
            are_finite.append(torch.isfinite(parameter).all())
    answers = torch.stack([answer.to(are_finite[0].device) for answer in are_finite]).tolist() if are_finite else []
    for (name, dtype), is_finite in zip(dtypes.items(), answers, strict=True):
        if not is_finite:
            raise ModelError(f"model: {name} holds NaN or infinities (in {str(dtype).removeprefix('torch.')})")


def _inputs(
    model: PreTrainedModel, ids_BT: Tensor, beside: Sequence[Mapping[str, Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """What the model is given for a batch, by name."""
    keys = dict.fromkeys(key for one in beside for key in one)
    joined = {key: torch.cat([one[key] for one in beside if key in one]) for key in keys}
    for key, values in joined.items():
        joined[key] = values.to(device, model.dtype if values.is_floating_point() else None)
    return {"input_ids": ids_BT.to(device), **joined}
