"""Stage "quantize": every linear of every decoder block by its method, one checkpoint file per block.

Per block it also writes `layers-*.json` (one row per linear: bits, ranks, errors) and, for the first, middle and last
block, `spectra-*.safetensors` (singular values of the weight and of the error, unscaled and activation-scaled).

Output errors are measured on sampled inputs of the calibration text, from the hidden states that the statistics are of.

Shapes: I in_features, O out_features, S sampled tokens, K = min(I, O).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lqer.checkpoint.bits import average_bits
from lqer.checkpoint.pack import DETAILS_FILE, describe_linear, pack_linears, write_outer
from lqer.errors import ModelError
from lqer.formats import NonFiniteError, QuantizedTensor
from lqer.methods import LinearPlan, QuantizedWeight
from lqer.models.loaders import OpenedModel
from lqer.models.open import open_stored
from lqer.models.structure import block_linears
from lqer.phases import in_phase, phase
from lqer.rounding.hessian import HessianError
from lqer.stages.alike import batches_of, units_of, with_statistics
from lqer.stages.allocate_ranks import Plans
from lqer.stages.base import no_effect
from lqer.stages.block_work import (
    BlockWork,
    QuantizedLinears,
    all_spectra,
    found_already,
    read_linears,
    remove_linears,
    units_there,
    write_block,
    write_linears,
)
from lqer.stages.calibrate import Calibrate
from lqer.stages.gang import GangStage
from lqer.stages.gather import BlockStatistics, StatisticsOf
from lqer.stages.layer_rows import later_spectra, layer_row, rounded_alone, with_numbers
from lqer.stages.observe import InputRoundings
from lqer.stages.plans import AnyPlans, resolve_plans
from lqer.stages.rotate import source_of
from lqer.statistics import ALONE, ALWAYS, Gang, Statistic
from lqer.statistics.site import SiteStatistics
from lqer.store.names import block_file, layers_file, linears_rows_file
from lqer.store.store import Artifact, Store, Workspace
from lqer.store.writer import most_waiting
from lqer.transforms import BlockTransform

# Of both orders of quantizing blocks: raised whenever the same inputs would give other bytes than before.
QUANTIZE_VERSION = 11

# Whether the linears of a block are quantized on inputs from its unrounded weights, or one input site after the other.
Order = Literal["block", "sequential"]


@dataclass(frozen=True)
class QuantizeSettings:
    """Plans by linear (None for a skipped one), the format of attention operands, the transforms of whole blocks.

    round_inputs: whether statistics that are gathered on the way are of inputs as the quantized linears round them.
    order: of error propagation within a block, see lqer/stages/quantize_in_turn.py.
    """

    plans: Plans
    attention: Mapping[str, Any] | None
    seed: int
    transforms: tuple[BlockTransform, ...] = ()
    round_inputs: bool = False
    order: Order = "block"


def requested_statistics(plans: Plans) -> frozenset[Statistic]:
    """The statistics besides `ALWAYS` that some linear's method, rounding or transform asks for."""
    needed = (plan.method.statistics_for(plan) for plan in plans.values() if plan is not None)
    return frozenset().union(*needed) - frozenset(ALWAYS)


def input_roundings(plans: Plans) -> InputRoundings:
    """How the linears round their inputs, of those that do."""
    roundings = {name: plan.input_rounding for name, plan in plans.items() if plan is not None}
    return {name: rounding for name, rounding in roundings.items() if rounding is not None}


@dataclass(frozen=True)
class Quantize(GangStage):
    """The checkpoint; every block is quantized on the inputs that reach it in the original model."""

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = QUANTIZE_VERSION

    calibration: Calibrate
    plans: AnyPlans
    attention: Mapping[str, Any] | None
    seed: int
    device: torch.device
    tokenizer: PreTrainedTokenizerBase = field(
        metadata=no_effect("it is a part of the model, and its fingerprint covers it")
    )
    label: str = field(metadata=no_effect("it names the stage in the log"))

    def build(self, workspace: Workspace, store: Store) -> None:
        self.build_by_ranks(workspace, store, self.device, self.calibration.text.batches)

    def build_together(self, workspace: Workspace, store: Store, gang: Gang) -> Callable[[], object]:
        opened, settings = open_stored(source_of(self.calibration.model, store), self.device), self._settings(store)
        statistics_of = self.calibration.of_blocks(store, gang)
        blocks: Sequence[int] = range(len(opened.blocks))
        # Statistics that are gathered on the way come in the order of the blocks.
        if self.device.type == "cuda" and (self.calibration.is_kept or self.calibration.find(store) is not None):
            blocks = last_in_between(len(blocks))
        quantize_blocks(workspace, blocks, opened, statistics_of, settings, gang)
        return partial(finish_checkpoint, workspace, opened, self.tokenizer, settings)

    def contribute(self, store: Store, chunk: range, blocks: int) -> Artifact | None:
        """Quantize a chunk of the `blocks` decoder blocks, alongside other processes.

        Returns the checkpoint if no other chunk is missing, else None.
        """

        def write(workspace: Workspace, opened: Callable[[], OpenedModel]) -> None:
            statistics_of = self.calibration.of_blocks(store)
            quantize_blocks(workspace, chunk, opened(), statistics_of, self._settings(store))
            remove_linears(workspace, chunk)

        return self._contribute(store, write, blocks)

    def contribute_linears(self, store: Store, index: int, unit: str, blocks: int) -> Artifact | None:
        """Quantize one unit of the linears of block `index` (lqer/stages/alike.py), alongside other processes.

        It waits in files of its own for `contribute` of that block, or `build`.
        """

        def write(workspace: Workspace, opened: Callable[[], OpenedModel]) -> None:
            if block_file(index) not in workspace and linears_rows_file(index, unit) not in workspace:
                statistics_of = self.calibration.of_blocks(store)
                quantize_unit(workspace, index, unit, opened(), statistics_of, self._settings(store))

        return self._contribute(store, write, blocks)

    def _contribute(
        self, store: Store, write: Callable[[Workspace, Callable[[], OpenedModel]], None], blocks: int
    ) -> Artifact | None:
        @cache
        def opened() -> OpenedModel:
            return open_stored(source_of(self.calibration.model, store), self.device)

        return store.contribute(
            self.name,
            self.key,
            write_part=lambda workspace: write(workspace, opened),
            is_whole=lambda workspace: all(block_file(index) in workspace for index in range(blocks)),
            finish=lambda workspace: finish_checkpoint(workspace, opened(), self.tokenizer, self._settings(store)),
        )

    @property
    def log_name(self) -> str:
        return self.label

    def summary(self, artifact: Artifact) -> str:
        return checkpoint_summary(artifact)

    def _settings(self, store: Store) -> QuantizeSettings:
        return QuantizeSettings(resolve_plans(self.plans, store), self.attention, self.seed)


def last_in_between(blocks: int) -> list[int]:
    """The blocks with the last one after the first quarter: at the end, nothing would be done beside its spectra."""
    first = blocks // 4
    return [*range(first), blocks - 1, *range(first, blocks - 1)]


def checkpoint_summary(checkpoint: Artifact) -> str:
    """Bits and the change of the mean output error, for the log."""
    details = checkpoint.json(DETAILS_FILE)
    rows = [row for index in range(details["blocks"]["count"]) for row in checkpoint.json(layers_file(index))]
    before, after = (sum(row[key] for row in rows) / len(rows) for key in ("output_error_before", "output_error"))
    return f"{details['bits']['average']:.4g} bits, mean relative output error {before:.4g} -> {after:.4g}"


def finish_checkpoint(
    workspace: Workspace, opened: OpenedModel, tokenizer: PreTrainedTokenizerBase, settings: QuantizeSettings
) -> None:
    """Write everything outside the blocks; every block has been written."""
    remove_linears(workspace, range(len(opened.blocks)))
    rows = [row for index in range(len(opened.blocks)) for row in workspace.json(layers_file(index))]
    details = {
        "blocks": {"name": opened.name, "count": len(opened.blocks)},
        "linears": {row["name"]: row["entry"] for row in rows},
        "attention": settings.attention,
        "bits": average_bits(rows),
    }
    opened.loader.load_outer()
    write_outer(workspace, opened.model, tokenizer, details, opened.processor)


def quantize_blocks(
    workspace: Workspace,
    chunk: Sequence[int],
    opened: OpenedModel,
    statistics_of: StatisticsOf,
    settings: QuantizeSettings,
    gang: Gang = ALONE,
) -> None:
    """Write the files of every block of a chunk that `workspace` does not hold yet, and nothing else.

    Linears that other processes have left for a block are taken from their files.
    `opened` holds the original weights in the checkpoint's own dtype. Raises ModelError, naming the linear, if a weight
    is NaN or infinite or if calibration never reached it.
    """
    missing = [index for index in chunk if block_file(index) not in workspace]
    there = {index: units_there(workspace, index, block_linears(opened.blocks[index])) for index in missing}
    left = {
        index: _missing_linears(
            block_linears(opened.blocks[index]), there[index], f"{opened.name}.{index}", settings.plans
        )
        for index in missing
    }
    found = statistics_of([index for index in missing if left[index]])
    with (
        workspace.writing_behind(most_waiting(opened.device.type == "cuda")),
        tqdm(initial=len(chunk) - len(missing), total=len(chunk), desc="quantize", unit="block") as bar,
    ):
        for index, values in opened.loader.values_of_each(opened.blocks, missing):
            work = BlockWork.on(opened, index, values)
            quantized = read_linears(workspace, index, there[index])
            if left[index]:
                statistics = next(found)
                quantized.add(quantize_linears(work, left[index], statistics, settings, opened.device, gang))
                del statistics
            quantized.sort([f"{work.name}.{name}" for name in work.linears])
            write_block(workspace, work, quantized)
            # Or else one block's tensors would be held together with the next one's.
            del work, values, quantized
            bar.update()


def quantize_unit(
    workspace: Workspace,
    index: int,
    unit: str,
    opened: OpenedModel,
    statistics_of: StatisticsOf,
    settings: QuantizeSettings,
) -> None:
    """Leave one unit of the linears of block `index` to whoever writes the block."""
    (statistics,) = statistics_of([index])
    for _, values in opened.loader.values_of_each(opened.blocks, [index]):
        work = BlockWork.on(opened, index, values)
        linears = units_of(work.linears)[unit]
        write_linears(workspace, index, unit, quantize_linears(work, linears, statistics, settings, opened.device))


def _missing_linears(linears: Iterable[str], there: Collection[str], block: str, plans: Plans) -> list[str]:
    """The linears of a block that are to be quantized, and are in none of the units that are there."""
    missing = [name for unit, names in units_of(linears).items() if unit not in there for name in names]
    return [name for name in missing if plans[f"{block}.{name}"] is not None]


def quantize_linears(
    work: BlockWork,
    linears: Collection[str],
    statistics: BlockStatistics,
    settings: QuantizeSettings,
    device: torch.device,
    gang: Gang = ALONE,
) -> QuantizedLinears:
    """Quantize some linears of a block, those that have a plan. Raises ModelError, naming the linear.

    Experts are quantized in batches (lqer/stages/alike.py). The ranks of a gang deal the batches out, and all get all
    linears.
    """
    found, full_names = QuantizedLinears(), [f"{work.name}.{name}" for name in linears]
    shapes = {f"{work.name}.{name}": work.linears[name] for name in linears}
    planned = [name for name in full_names if settings.plans[name] is not None]
    batches = batches_of(planned, statistics, settings.plans, shapes, device)
    ours = gang.deal({batch[0]: sum(_length(shapes[name]) for name in batch) for batch in batches})
    of_ours = _quantize_ours(work, [batch for batch in batches if batch[0] in ours], statistics, settings, device)
    if gang.size == 1:
        found.add(of_ours)
    else:
        # Between processes values travel.
        parts = (of_ours.tensors, of_ours.replaced, of_ours.rows, all_spectra(of_ours.spectra))
        for tensors, replaced, rows, spectra in gang.gathered(parts):
            found.add(QuantizedLinears(tensors, replaced, rows, found_already(spectra)))
    found.sort(full_names)
    return found


def _length(shape: torch.Size) -> float:
    """How long a linear takes, compared with others: updates of the columns behind each column."""
    return float(shape.numel() * shape[-1])


def _quantize_ours(
    work: BlockWork,
    batches: Sequence[list[str]],
    statistics: BlockStatistics,
    settings: QuantizeSettings,
    device: torch.device,
) -> QuantizedLinears:
    found = QuantizedLinears()
    for batch in with_statistics(batches, statistics, device):
        # For methods that draw: whatever has been quantized here before.
        torch.manual_seed(settings.seed)
        plan = settings.plans[batch[0][0]]
        assert plan is not None
        weights = [_stored_weight(work, full_name, device) for full_name, _ in batch]
        quantized, names = _quantize_batch(work, batch, weights, plan), [full_name for full_name, _ in batch]
        with phase("pack"):
            found.tensors.update(pack_linears(names, quantized, [_bias(work, name, plan) for name in names]))
        for (full_name, site), weight_OI, weight in zip(batch, weights, quantized, strict=True):
            found.add(_told(work, full_name, site, weight_OI, weight, plan, statistics.routed_tokens(full_name)))
    return replace(found, rows=with_numbers(found.rows))


@in_phase("read")
def _stored_weight(work: BlockWork, full_name: str, device: torch.device) -> Tensor:
    weight_OI = work.tensors[f"{full_name.removeprefix(f'{work.name}.')}.weight"].detach()
    # In two steps: in one, the CPU would widen the values, and the GPU wait for twice as many bytes.
    return weight_OI.to(device, non_blocking=True).to(torch.float32)


@in_phase("round")
def _quantize_batch(
    work: BlockWork, batch: Sequence[tuple[str, SiteStatistics]], weights: Sequence[Tensor], plan: LinearPlan
) -> list[QuantizedWeight]:
    rounded = [work.rounded.get(full_name.removeprefix(f"{work.name}.")) for full_name, _ in batch]
    if len(batch) > 1 and not any(rounded):
        try:
            return plan.quantize_together(weights, [site for _, site in batch])
        except (NonFiniteError, HessianError):
            # One of them; alone it is named.
            pass
    return [
        _quantize_weight(full_name, weight_OI, site, plan, one)
        for (full_name, site), weight_OI, one in zip(batch, weights, rounded, strict=True)
    ]


def _quantize_weight(
    full_name: str, weight_OI: Tensor, site: SiteStatistics, plan: LinearPlan, rounded: QuantizedTensor | None
) -> QuantizedWeight:
    try:
        if rounded is None:
            return plan.quantize(weight_OI, site)
        return plan.method.reconstruct_error(weight_OI, rounded, site, plan)
    except (NonFiniteError, HessianError) as error:
        raise ModelError(f"{full_name}: {error}") from None


def _bias(work: BlockWork, full_name: str, plan: LinearPlan) -> QuantizedTensor | None:
    """The bias in the plan's format; None where there is no bias, or no format. Raises ModelError."""
    bias_O = work.bias(full_name)
    if bias_O is None or plan.bias is None:
        return None
    try:
        return plan.bias.quantize(bias_O.detach())
    except NonFiniteError as error:
        raise ModelError(f"{full_name}: {error}") from None


def _told(
    work: BlockWork,
    full_name: str,
    site: SiteStatistics,
    weight_OI: Tensor,
    weight: QuantizedWeight,
    plan: LinearPlan,
    routed_tokens: int | None,
) -> QuantizedLinears:
    """What is written of one linear beside its packed tensors."""
    has_bias = work.bias(full_name) is not None
    replaced = {f"{full_name}.weight"} | ({f"{full_name}.bias"} if has_bias and plan.bias is not None else set())
    found = QuantizedLinears(replaced=replaced)
    entry = describe_linear(plan, weight, has_bias)
    rounded_OI = rounded_alone(weight_OI, weight, site, plan)
    of_expert = {} if routed_tokens is None else {"routed_tokens": routed_tokens}
    found.rows.append(layer_row(full_name, weight_OI, rounded_OI, weight, site) | of_expert | {"entry": entry})
    # Of a layer's experts, those of the first one.
    if work.with_spectra and (not of_expert or full_name.rsplit(".", 2)[1] == "0"):
        at_once = not work.finds_spectra_later
        found.spectra.append(later_spectra(full_name, weight_OI, rounded_OI, site, at_once))
    return found
