"""The quantized stream: every block is quantized on what the blocks quantized before it make of the text.

    for every decoder block, first to last:
        statistics of its linears' inputs, from the original block on the hidden states so far
        a block step, where there is one: transforms, rounding of the whole block at once
        its linears through their methods; the block's files
        hidden states = the quantized block, as it is loaded from those files, on the hidden states so far

All linears of a block see inputs from its original weights (GPTVQ, arXiv 2402.15319; not GPTQ's "true sequential").
Operands of attention are rounded throughout where they will be. A killed run goes on with the next block: those whose
files are there are only run.

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lqer.checkpoint.load import fill_block
from lqer.formats import QuantizedTensor
from lqer.methods import LinearPlan
from lqer.models.loaders import OpenedModel
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun, Stream, enter
from lqer.nn.attention import attention_as, quantize_attention, quantized_attention
from lqer.stages.calibrate import CalibrationText, calibration_key, observe_block
from lqer.stages.quantize import BlockWork, QuantizeSettings, requested_statistics, with_spectra, write_block
from lqer.store.names import block_file, layers_file
from lqer.store.store import Workspace
from lqer.transforms.block_function import BlockFunction


@dataclass(frozen=True)
class BlockTask:
    """What a block step is given: a block, the inputs that reach it and the outputs it should have.

    function(parameters, hidden_BTD) is the original block, in the run's dtype on its device, with some parameters
    replaced; it takes any number of windows. plans: by the names of linears within the block. inputs_WTD are the states
    of the quantized stream, targets_WTD what the original block makes of those of the original stream; both are
    allocated by the offload and must not be changed. stored: the block's parameters and buffers as the checkpoint has
    them, on the CPU. attention: the name of the original's attention in transformers' registry, for a step that learns:
    rounded operands carry no gradient.
    """

    index: int
    name: str
    block: nn.Module
    function: BlockFunction
    plans: Mapping[str, LinearPlan | None]
    inputs_WTD: Tensor
    targets_WTD: Tensor
    stored: Mapping[str, Tensor]
    attention: str
    device: torch.device


@dataclass(frozen=True)
class BlockChange:
    """What a block step made: parameters by their names within the block, and rounded weights by their linear's name.

    What stays out keeps its value; a linear that is not in `rounded` is rounded by its plan, from the weight that
    stands in `parameters`.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    rounded: Mapping[str, QuantizedTensor] = field(default_factory=dict)


class BlockStep(Protocol):
    """What is done to a whole block before its linears are quantized one by one."""

    def __call__(self, task: BlockTask) -> BlockChange: ...


def stream_key(
    model_fingerprint: str, text: CalibrationText, dtype: torch.dtype, device: torch.device, settings: QuantizeSettings
) -> dict[str, Any]:
    """What decides the statistics of the quantized stream, beside the plans."""
    requested = requested_statistics(settings.plans)
    return {"propagate": "quantized", **calibration_key(model_fingerprint, text, dtype, device, requested)}


def quantize_in_order(
    workspace: Workspace,
    stored: OpenedModel,
    running: OpenedModel,
    text: CalibrationText,
    settings: QuantizeSettings,
    step: BlockStep | None = None,
) -> None:
    """Write the files of every block that `workspace` does not hold yet.

    stored: the original weights in the checkpoint's own dtype. running: the same in the dtype of the run; its attention
    is quantized for good where the settings say so, and its offload holds the hidden states. step: taken for
    every block. Raises ModelError, naming the linear, where a weight or an input is not finite, or was never reached.
    """
    total = len(running.blocks)
    missing = [index for index in range(total) if block_file(index) not in workspace]
    if not missing:
        return
    batches = text.windows_WT.split(text.batch_size)
    implementation = running.model.config._attn_implementation
    original = None if step is None else enter(running, batches)
    if settings.attention is not None:
        quantize_attention(running.model, quantized_attention(settings.attention))
    stream = enter(running, batches)
    weights = _weights(stored, missing)
    whole = _Pass(text, settings, step, total, implementation)
    # Nobody needs what the blocks behind the last missing one put out.
    indices = range(missing[-1] + 1)
    visits = running.loader.visits(running.blocks, indices, running.device)
    for index, block in tqdm(visits, total=total, desc="quantize", unit="block"):
        visit = BlockRun(index, f"{running.name}.{index}", block, stream, running.device)
        if original is not None:
            with attention_as(block, implementation):
                BlockRun(index, visit.name, block, original, running.device).forward()
        if block_file(index) not in workspace:
            tensors = next(weights)
            work = _after_step(visit, original, tensors, whole)
            write_block(workspace, work, settings, running.device)
            del tensors, work
        if index != indices[-1]:
            _run_quantized(visit, workspace)


@dataclass(frozen=True)
class _Pass:
    """What is the same for every block: `attention` is the name of the original's in transformers' registry."""

    text: CalibrationText
    settings: QuantizeSettings
    step: BlockStep | None
    blocks: int
    attention: str


def _weights(stored: OpenedModel, indices: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """The tensors of these blocks as the checkpoint has them, on the CPU."""
    for _, block in stored.loader.visits(stored.blocks, indices, torch.device("cpu")):
        yield block.state_dict()


def _after_step(
    visit: BlockRun,
    original: Stream | None,
    tensors: dict[str, Tensor],
    whole: _Pass,
) -> BlockWork:
    """The block as the step leaves it, with the statistics of its linears' inputs."""
    plans = {name: whole.settings.plans[f"{visit.name}.{name}"] for name in block_linears(visit.block)}
    change = BlockChange()
    if whole.step is not None:
        assert original is not None
        call = visit.stream.calls_of_one[visit.index]
        change = whole.step(
            BlockTask(
                index=visit.index,
                name=visit.name,
                block=visit.block,
                function=BlockFunction(visit.block, call.args, call.kwargs),
                plans=plans,
                inputs_WTD=visit.stream.settled(visit.device),
                targets_WTD=original.settled(visit.device),
                stored=tensors,
                attention=whole.attention,
                device=visit.device,
            )
        )
    changed = _with_parameters(visit, change.parameters)
    return BlockWork(
        index=visit.index,
        name=visit.name,
        linears=list(plans),
        tensors=tensors | dict(change.parameters),
        statistics=observe_block(changed, None, whole.text, requested_statistics(plans)),
        with_spectra=visit.index in with_spectra(whole.blocks),
        rounded=change.rounded,
    )


def _with_parameters(visit: BlockRun, parameters: Mapping[str, Tensor]) -> BlockRun:
    """The visit of a copy of the block with some parameters replaced; of the block itself where none is."""
    if not parameters:
        return visit
    block = copy.deepcopy(visit.block)
    with torch.no_grad():
        for name, tensor in parameters.items():
            block.get_parameter(name).copy_(tensor)
    return BlockRun(visit.index, visit.name, block, visit.stream, visit.device)


def _run_quantized(visit: BlockRun, workspace: Workspace) -> None:
    """Take the hidden states through the block as its files have it."""
    prefix = f"{visit.name}."
    stored = workspace.tensors(block_file(visit.index))
    tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    entries = {row["name"].removeprefix(prefix): row["entry"] for row in workspace.json(layers_file(visit.index))}
    block = copy.deepcopy(visit.block)
    fill_block(block, tensors, entries, visit.device, visit.stream.states_WTD.dtype, "emulate")
    BlockRun(visit.index, visit.name, block, visit.stream, visit.device).forward()
