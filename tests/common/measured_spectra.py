"""A model whose spectra are measured and ranks allocated: what each of its linears is quantized by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from helpers import resident
from torch import Tensor
from transformers import PreTrainedModel

from lqer.formats import MXInt
from lqer.methods import LinearPlan, Plans, QeraExact
from lqer.models.structure import block_linears, find_blocks
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText, stored_statistics
from lqer.stages.measure_spectra import measure_spectra
from lqer.stages.plans import Shapes
from lqer.statistics import Hessian
from lqer.store.names import block_file
from lqer.store.store import Artifact, Store, Workspace

BLOCKS = 4
SIZES = {"num_hidden_layers": BLOCKS, "hidden_size": 64, "intermediate_size": 96}
FIXED_RANK, SKIPPED = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"


@dataclass(frozen=True)
class MeasuredSpectra:
    """A model that nobody may change, its calibration, and what follows from them.

    plans: open ranks, but for a fixed one and a skipped linear; one kind of linear is rounded to fewer bits.
    """

    model: PreTrainedModel
    calibration: Artifact
    plans: Plans
    store: Store

    @classmethod
    def of(cls, model: PreTrainedModel, windows_WT: Tensor, folder: Path) -> MeasuredSpectra:
        store, text = Store(folder), CalibrationText(windows_WT, 2, 8)
        calibration = store.obtain("calibrate", 0, lambda ws: calibrate(ws, resident(model), text, {Hessian()}))
        plan = LinearPlan(QeraExact(), MXInt(3), rank=None, factor=MXInt(8, 8), factor_axis="reduction")
        name, blocks = find_blocks(model)
        plans: dict[str, LinearPlan | None] = {
            f"{name}.{i}.{linear}": replace(plan, weight=MXInt(2)) if linear.endswith("v_proj") else plan
            for i, block in enumerate(blocks)
            for linear in block_linears(block)
        }
        return cls(model, calibration, {**plans, FIXED_RANK: replace(plan, rank=16), SKIPPED: None}, store)

    @cached_property
    def shapes(self) -> Shapes:
        return {name: tuple(self.model.get_submodule(name).weight.shape) for name in self.plans}

    @cached_property
    def artifact(self) -> Artifact:
        return self.store.obtain("spectra", 0, self.measure)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Of all blocks."""
        return {key: value for i in range(BLOCKS) for key, value in self.artifact.tensors(block_file(i)).items()}

    def measure(self, workspace: Workspace) -> None:
        measure_spectra(workspace, resident(self.model), stored_statistics(self.calibration), self.plans)
