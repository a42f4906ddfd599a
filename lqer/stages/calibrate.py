"""Stage "calibrate": statistics of the inputs of every linear, one safetensors file per decoder block.

Linears that are called with the same tensor (q, k and v; gate and up) form one input site and share its statistics. A
file holds, for each site named after its first linear, `<site>.<kind>` for every statistic that is gathered:
`statistics.ALWAYS`, and those that a method, rounding or transform asks for. `sites-*.json` says which site each linear
of a block belongs to.

Statistics that are not kept are gathered block by block by the stage that reads them, on the same hidden states. If
that is killed, it walks again from the first block; blocks whose statistics are not needed any more are only run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from tqdm import tqdm

from lqer.components import ADDED
from lqer.models.loaders import OpenedModel
from lqer.models.source import ModelSource
from lqer.models.streaming import open_model
from lqer.models.structure import within_block
from lqer.models.walker import walk_blocks
from lqer.stages.base import no_effect
from lqer.stages.gang import GangStage
from lqer.stages.gather import (
    BlockStatistics,
    CalibrationText,
    StatisticsOf,
    observe_block,
    stored_statistics,
)
from lqer.stages.observe import NOT_ROUNDED, InputRoundings
from lqer.stages.rotate import Rotate, source_of
from lqer.statistics import ALONE, Gang, Statistic
from lqer.store.names import block_file, sites_file
from lqer.store.offload import Offload
from lqer.store.store import Store, Workspace
from lqer.store.writer import most_waiting


@dataclass(frozen=True)
class Calibrate(GangStage):
    """The statistics of every block of the original model."""

    name: ClassVar[str] = "calibrate"
    version: ClassVar[int] = 4

    model: ModelSource | Rotate
    text: CalibrationText
    statistics: frozenset[Statistic]
    dtype: torch.dtype
    device: torch.device
    offload: Offload = field(metadata=no_effect("it decides where numbers are stored, not their values"))
    # Keys are full names, of the linears whose statistics are of rounded inputs.
    roundings: InputRoundings | None = field(default=None, metadata=ADDED)

    # What no other stage reads, or is too large for the disk, is gathered where it is used (`calibration.keep`).
    is_kept: bool = field(default=True, metadata=no_effect("statistics are the same, stored or not"))

    def build(self, workspace: Workspace, store: Store) -> None:
        self.build_by_ranks(workspace, store, self.device, self.text.batches)

    def build_together(self, workspace: Workspace, store: Store, gang: Gang) -> Callable[[], object]:
        text, roundings = self.text.with_weights(store), self.roundings or NOT_ROUNDED
        calibrate(workspace, self._opened(store, gang), text, self.statistics, roundings)
        return lambda: None

    def provide_blocks(self, store: Store, indices: Iterable[int]) -> None:
        """Return once the statistics of these blocks are stored, maybe by a process that is at later ones."""
        self.provide(store, files_of(indices))

    def of_blocks(self, store: Store, gang: Gang = ALONE) -> StatisticsOf:
        """The statistics of blocks: the artifact's where it is kept, or there already, else gathered in one walk.

        Those of a block can be read while another process gathers those of later blocks.
        """
        if (artifact := self.find(store)) is not None:
            return stored_statistics(artifact)

        def stored(indices: Sequence[int]) -> Iterator[BlockStatistics]:
            self.provide_blocks(store, indices)
            for index in indices:
                yield store.read(self.identity, partial(BlockStatistics.read, index=index))

        if self.is_kept:
            return stored

        def gathered(indices: Sequence[int]) -> Iterator[BlockStatistics]:
            if indices:
                opened, text = self._opened(store, gang), self.text.with_weights(store)
                yield from gather_blocks(opened, text, self.statistics, self.roundings or NOT_ROUNDED, indices)

        return gathered

    def _opened(self, store: Store, gang: Gang) -> OpenedModel:
        return replace(open_model(source_of(self.model, store), self.dtype, self.device, self.offload), gang=gang)


def files_of(indices: Iterable[int]) -> tuple[str, ...]:
    """The files that hold the statistics of these blocks."""
    return tuple(name for index in indices for name in (sites_file(index), block_file(index)))


def calibrate(
    workspace: Workspace,
    opened: OpenedModel,
    text: CalibrationText,
    statistics: Collection[Statistic] = (),
    roundings: InputRoundings = NOT_ROUNDED,
) -> None:
    """Gather the statistics of every block that `workspace` does not hold yet.

    statistics: those to gather in addition to `ALWAYS`; one block's are in memory at a time. roundings: of the
    inputs before anything is gathered from them, by full names. Raises ModelError, naming the linear, where an input is
    NaN or infinite.
    """
    total = len(opened.blocks)
    missing = [index for index in range(total) if block_file(index) not in workspace]
    found = gather_blocks(opened, text, statistics, roundings, missing)
    bar = tqdm(missing, initial=total - len(missing), total=total, desc="calibrate", unit="block")
    with workspace.writing_behind(most_waiting(opened.device.type == "cuda")):
        for index in bar:
            of_block = next(found)
            workspace.write_json(sites_file(index), of_block.sites)
            # Last: its presence marks the block as done.
            workspace.write_tensors(block_file(index), of_block.tensors)
            # Otherwise one block's statistics would be held together with the next one's.
            del of_block


def gather_blocks(
    opened: OpenedModel,
    text: CalibrationText,
    statistics: Collection[Statistic],
    roundings: InputRoundings,
    indices: Sequence[int],
) -> Iterator[BlockStatistics]:
    """The statistics of these blocks of the original model, ascending; the others before the last are only run."""
    if not indices:
        return
    for run in walk_blocks(opened, text.windows_WT, text.batch_size, indices[-1] + 1, text.beside):
        if run.index not in indices:
            run.forward()
            continue
        found = observe_block(run, None, text, statistics, run.keep, within_block(roundings, run.name))
        yield found
        del found
