"""Stage "calibrate": statistics of the inputs of every linear, one safetensors file per decoder block.

Linears that are called with the same tensor (q, k and v; gate and up) form one input site and share its statistics. A
file holds, for each site named after its first linear, `<site>.<kind>` for every statistic that is gathered:
`statistics.ALWAYS`, and those that a method, rounding or transform asks for. `sites-*.json` says which site each linear
of a block belongs to.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from tqdm import tqdm

from lqer.components import ADDED
from lqer.models.loaders import OpenedModel
from lqer.models.source import ModelSource
from lqer.models.streaming import open_model
from lqer.models.walker import walk_blocks
from lqer.stages.base import Stage, no_effect
from lqer.stages.gather import NOT_ROUNDED, CalibrationText, InputRoundings, observe_block, within_block
from lqer.stages.rotate import Rotate, source_of
from lqer.statistics import Statistic
from lqer.store.names import block_file, sites_file
from lqer.store.offload import Offload
from lqer.store.store import Store, Workspace


@dataclass(frozen=True)
class Calibrate(Stage):
    """The statistics of every block of the original model."""

    name: ClassVar[str] = "calibrate"
    version: ClassVar[int] = 4

    model: ModelSource | Rotate
    text: CalibrationText
    statistics: frozenset[Statistic]
    dtype: torch.dtype
    device: torch.device
    offload: Offload = field(metadata=no_effect("it decides where numbers are stored, not their values"))
    # By full name, of linears whose statistics are of rounded inputs.
    roundings: InputRoundings | None = field(default=None, metadata=ADDED)

    def build(self, workspace: Workspace, store: Store) -> None:
        opened = open_model(source_of(self.model, store), self.dtype, self.device, self.offload)
        calibrate(workspace, opened, self.text, self.statistics, self.roundings or NOT_ROUNDED)


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
    runs = walk_blocks(opened, text.windows_WT, text.batch_size)
    for run in tqdm(runs, total=len(opened.blocks), desc="calibrate", unit="block"):
        if block_file(run.index) in workspace:
            run.forward()
            continue
        found = observe_block(run, None, text, statistics, run.hidden.store, within_block(roundings, run.name))
        workspace.write_json(sites_file(run.index), found.sites)
        # Last: its presence marks the block as done.
        workspace.write_tensors(block_file(run.index), found.tensors)
        # Or else one block's statistics would be held together with the next one's.
        del found
