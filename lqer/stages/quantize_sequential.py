"""Quantization with error propagation: every block is quantized on the outputs of the quantized blocks before it.

    for every decoder block, first to last:
        reconstruct the block where transforms or an adaptive rounding ask for it
        gather statistics of its linears' inputs, the weights still unrounded, on the quantized model's hidden states
        quantize its linears by their methods; write the block's files
        hidden states = outputs of the quantized block, as a checkpoint with those files computes them

All linears of a block see inputs from its unrounded weights, or take turns (lqer/stages/quantize_in_turn.py).
Attention operands are rounded in the quantized model's hidden states throughout. A killed run resumes at the first
block without files: blocks that have them are only run.

Shapes: W windows, T tokens of a window, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lqer.checkpoint.load import fill_block
from lqer.components import ADDED
from lqer.lowrank.krylov_graphs import recorded_growth
from lqer.models.loaders import OpenedModel
from lqer.models.open import open_stored
from lqer.models.source import ModelSource
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun, HiddenStates, embed, refuse_non_finite
from lqer.nn.attention import quantize_attention, quantized_attention
from lqer.phases import phase
from lqer.stages.base import no_effect
from lqer.stages.block_work import BlockWork, blocks_with_spectra, weight_shapes, write_block
from lqer.stages.gang import GangStage
from lqer.stages.gather import CalibrationText
from lqer.stages.plans import AnyPlans, resolve_plans
from lqer.stages.quantize import QUANTIZE_VERSION, checkpoint_summary, finish_checkpoint
from lqer.stages.quantize_in_turn import quantize_block
from lqer.stages.quantize_linears import Order, QuantizeSettings, requested_statistics
from lqer.stages.reconstruct_block import block_reconstruction, remove_states
from lqer.stages.rotate import Rotate, source_of
from lqer.statistics import Gang
from lqer.store.names import block_file, layers_file
from lqer.store.offload import Offload
from lqer.store.store import Artifact, Store, Workspace
from lqer.store.writer import most_waiting
from lqer.transforms import BlockTransform
from lqer.transforms.block_result import BlockResult


@dataclass(frozen=True)
class QuantizeSequentially(GangStage):
    """The checkpoint; every block is quantized on the outputs of the quantized blocks before it."""

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = QUANTIZE_VERSION

    model: ModelSource | Rotate
    text: CalibrationText
    plans: AnyPlans
    attention: Mapping[str, Any] | None
    transforms: tuple[BlockTransform, ...]
    seed: int
    dtype: torch.dtype
    device: torch.device
    tokenizer: PreTrainedTokenizerBase = field(
        metadata=no_effect("it is a part of the model, and its fingerprint covers it")
    )
    offload: Offload = field(metadata=no_effect("it decides where numbers are stored, not their values"))
    label: str = field(metadata=no_effect("it names the stage in the log"))
    # Whether statistics are of inputs as the quantized linears round them.
    round_inputs: bool = field(default=False, metadata=ADDED)
    order: Order = field(default="block", metadata=ADDED)

    def build(self, workspace: Workspace, store: Store) -> None:
        self.build_by_ranks(workspace, store, self.device, self.text.batches)

    def build_together(self, workspace: Workspace, store: Store, gang: Gang) -> Callable[[], object]:
        plans = resolve_plans(self.plans, store)
        settings = QuantizeSettings(
            plans, self.attention, self.seed, self.transforms, round_inputs=self.round_inputs, order=self.order
        )
        source = source_of(self.model, store)
        stored = open_stored(source, self.device)
        running = replace(open_model(source, self.dtype, self.device, self.offload), gang=gang)
        quantize_in_order(workspace, stored, running, self.text.with_weights(store), settings)
        return partial(finish_checkpoint, workspace, stored, self.tokenizer, settings)

    @property
    def log_name(self) -> str:
        return self.label

    def summary(self, artifact: Artifact) -> str:
        return checkpoint_summary(artifact)


def quantize_in_order(
    workspace: Workspace, stored: OpenedModel, running: OpenedModel, text: CalibrationText, settings: QuantizeSettings
) -> None:
    """Write the files of every block that `workspace` does not hold yet.

    stored: the original weights in the checkpoint's own dtype. running: the same in the dtype of the run; its attention
    is quantized for good where the settings say so, its offload allocates the hidden states, its gang shares them out.

    Raises ModelError, naming the linear, where a weight or an input is not finite, or the text never reaches it.
    """
    missing = [index for index in range(len(running.blocks)) if block_file(index) not in workspace]
    if missing:
        with recorded_growth(), workspace.writing_behind(most_waiting(running.device.type == "cuda")):
            _quantize_missing(workspace, stored, running, text, settings, missing)
    remove_states(workspace)


def _quantize_missing(
    workspace: Workspace,
    stored: OpenedModel,
    running: OpenedModel,
    text: CalibrationText,
    settings: QuantizeSettings,
    missing: Sequence[int],
) -> None:
    attention = running.model.config._attn_implementation
    reconstruction = block_reconstruction(workspace, settings, text.batch_size, attention)
    compared = text.needs_original or any(one.needs_original for one in requested_statistics(settings.plans))
    embedded = partial(embed, running, text.windows_WT.split(text.batch_size), text.beside, near=True)
    original: _OriginalStates | None = None
    if reconstruction is not None or compared:
        original = _OriginalStates(embedded(), attention, compared)
    if settings.attention is not None:
        quantize_attention(running.model, quantized_attention(settings.attention))
    hidden = embedded()
    # Where the run computes in the checkpoint's own dtype, a block is read once.
    weights = None if _dtypes(stored) == _dtypes(running) else _stored_values(stored, missing)
    in_place = running.loader.gives_copies
    # Stop after the last missing block: later outputs are never used.
    indices = range(missing[-1] + 1)
    blocks = running.loader.load_each(running.blocks, indices, running.device)
    for index, block in tqdm(blocks, total=len(running.blocks), desc="quantize", unit="block"):
        run = BlockRun(index, f"{running.name}.{index}", block, hidden, running.device)
        refuse_non_finite(block.named_parameters(run.name))
        original_run = None if original is None else original.run(run)
        if index in missing:
            tensors, result = RunTensors(block) if weights is None else next(weights), BlockResult()
            if reconstruction is not None and original is not None:
                plans = {name: settings.plans[f"{run.name}.{name}"] for name in block_linears(block)}
                result = reconstruction.run(run, original.outputs.synchronized(running.device), plans, tensors)
            unrounded, work = _transformed(run, tensors, result, blocks_with_spectra(len(running.blocks)))
            beside = original_run and original_run.with_block(unrounded.block)
            found = quantize_block(unrounded, beside, text, work, settings, in_place and original is None)
            packed, rows = write_block(workspace, work, found), found.rows
            # Otherwise one block's tensors would be held together with the next one's.
            del tensors, result, block, unrounded, beside, work, found
        elif index != indices[-1]:
            packed, rows = workspace.tensors(block_file(index)), workspace.json(layers_file(index))
        if index != indices[-1]:
            _run_quantized(run, packed, rows, in_place)
        packed, rows = {}, []
        if original is not None:
            original.advance()


class _OriginalStates:
    """The original model's hidden states at one block: its inputs and, once it has been run, its outputs.

    compared: whether statistics read the inputs after the outputs are known, which takes two buffers.
    """

    def __init__(self, embedded: HiddenStates, attention: str, compared: bool):
        self._inputs, self._attention = embedded, attention
        self.outputs = embedded.empty_like() if compared else embedded

    def run(self, run: BlockRun) -> BlockRun:
        """The block of `run` with these inputs, of which it has made `outputs`."""
        original = BlockRun(run.index, run.name, run.block, self._inputs, run.device, self._attention)
        original.forward(to=self.outputs)
        return original

    def advance(self) -> None:
        """Take the outputs for the inputs of the next block."""
        self._inputs, self.outputs = self.outputs, self._inputs


def _transformed(
    run: BlockRun, tensors: Mapping[str, Tensor], result: BlockResult, spectra_of: Collection[int]
) -> tuple[BlockRun, BlockWork]:
    """The block with the parameters that transforms have changed, on its inputs, and the work that is left on it."""
    block = _with_parameters(run.block, result.parameters)
    work = BlockWork(
        index=run.index,
        name=run.name,
        linears=weight_shapes(block),
        tensors={**tensors, **result.parameters} if result.parameters else tensors,
        with_spectra=run.index in spectra_of,
        rounded=result.rounded,
    )
    return run.with_block(block), work


class RunTensors(Mapping[str, Tensor]):
    """Parameters and buffers of a block that is run, by name. A linear that has been replaced has none."""

    def __init__(self, block: nn.Module):
        self._linears = {f"{name}.weight": name for name in block_linears(block)}
        self._block = block
        self._others = {name: tensor for name, tensor in block.state_dict().items() if name not in self._linears}

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        yield from (weight for weight in self._linears if self._linear(weight) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        if (linear := self._linear(name)) is not None:
            return linear.weight.detach()
        return self._others[name]

    def _linear(self, weight: str) -> nn.Linear | None:
        module = self._block.get_submodule(self._linears[weight]) if weight in self._linears else None
        return module if isinstance(module, nn.Linear) else None


def _dtypes(opened: OpenedModel) -> dict[str, torch.dtype]:
    """The dtypes of the parameters of a block."""
    return {name: parameter.dtype for name, parameter in opened.blocks[0].named_parameters()}


def _stored_values(stored: OpenedModel, indices: Sequence[int]) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of these blocks as the checkpoint has them."""
    return (values for _, values in stored.loader.values_of_each(stored.blocks, indices))


def _with_parameters(block: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the block with some parameters replaced; the block itself if there are none."""
    if not parameters:
        return block
    block = copy.deepcopy(block)
    with torch.no_grad():
        for name, tensor in parameters.items():
            block.get_parameter(name).copy_(tensor)
    return block


def _run_quantized(
    run: BlockRun, packed: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]], in_place: bool
) -> None:
    """Propagate the hidden states through the quantized block; packed, rows: the content of its files.

    in_place: each linear takes the place of the one in `run`, so that memory need not hold the block twice.
    """
    prefix = f"{run.name}."
    with phase("load"):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in packed.items()}
        entries = {row["name"].removeprefix(prefix): row["entry"] for row in rows}
        block = run.block if in_place else copy.deepcopy(run.block)
        fill_block(block, tensors, entries, run.device, run.hidden.states_WTD.dtype, "emulate")
    run.with_block(block).forward()
