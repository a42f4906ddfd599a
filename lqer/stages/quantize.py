"""Stage "quantize": every linear of every decoder block by its method, one checkpoint file per block.

Per block it also writes `layers-*.json` (one row per linear: bits, ranks, errors) and, for the first, middle and last
block, `spectra-*.safetensors` (singular values of the weight and of the error, unscaled and activation-scaled).

Output errors are measured on sampled inputs of the calibration text, from the hidden states that the statistics are of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lqer.checkpoint.bits import average_bits
from lqer.checkpoint.pack import DETAILS_FILE, write_outer
from lqer.lowrank.krylov_graphs import recorded_growth
from lqer.methods import Plans
from lqer.models.loaders import OpenedModel
from lqer.models.open import open_stored
from lqer.models.structure import block_linears
from lqer.stages.alike import units_of
from lqer.stages.base import no_effect
from lqer.stages.block_work import (
    BlockWork,
    read_linears,
    remove_linears,
    units_there,
    write_block,
    write_linears,
)
from lqer.stages.calibrate import Calibrate
from lqer.stages.gang import GangStage
from lqer.stages.gather import StatisticsOf
from lqer.stages.plans import AnyPlans, resolve_plans
from lqer.stages.quantize_linears import QuantizeSettings, quantize_linears
from lqer.stages.rotate import source_of
from lqer.statistics import ALONE, Gang
from lqer.store.names import block_file, layers_file, linears_rows_file
from lqer.store.store import Artifact, Store, Workspace
from lqer.store.writer import most_waiting

# The version of both orders of quantizing blocks: raised whenever the same inputs would give other bytes than before.
QUANTIZE_VERSION = 11


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
            blocks = ends_in_between(len(blocks))
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


def ends_in_between(blocks: int) -> list[int]:
    """The blocks with the first one after the second and the last one after the first quarter.

    At the end nothing would be done beside a block's spectra; at the beginning a rehearsal of the evaluation would wait
    for them (lqer/run/rehearsal.py), behind which a block is written.
    """
    first = blocks // 4
    order = [*range(first), blocks - 1, *range(first, blocks - 1)]
    return order if first < 2 else [1, 0, *order[2:]]


def checkpoint_summary(checkpoint: Artifact) -> str:
    """Bits and the mean output error, of rounding alone too where there are factors, for the log."""
    details = checkpoint.json(DETAILS_FILE)
    rows = [row for index in range(details["blocks"]["count"]) for row in checkpoint.json(layers_file(index))]
    before, after = (sum(row[key] for row in rows) / len(rows) for key in ("output_error_before", "output_error"))
    error = f"{before:.4g} rounded, {after:.4g} with A·B" if any(row["rank"] for row in rows) else f"{after:.4g}"
    return f"{details['bits']['average']:.4g} bits, mean relative output error {error}"


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
        recorded_growth(),
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
            quantized.sort(work.full_names(work.linears))
            write_block(workspace, work, quantized)
            # Otherwise one block's tensors would be held together with the next one's.
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
