"""A model whose widths are measured and allocated: what each of its linears is quantized by, and may choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from helpers import resident
from torch import Tensor
from transformers import PreTrainedModel

from lqer.formats import MXInt, NumberFormat
from lqer.methods import LinearPlan, Plans, QeraExact
from lqer.models.backward import walk_backward
from lqer.models.structure import block_linears, find_blocks
from lqer.rounding import Gptq
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText
from lqer.stages.measure_widths import Choices, measure_widths, plans_to_measure
from lqer.stages.plans import Shapes
from lqer.statistics import Hessian
from lqer.store.names import block_file
from lqer.store.store import Artifact, Store, Workspace

BLOCKS, SEED = 3, 1
SIZES = {"num_hidden_layers": BLOCKS, "hidden_size": 64, "intermediate_size": 96}
FORMATS: tuple[NumberFormat, ...] = (MXInt(2), MXInt(3), MXInt(4))
OWN_FORMAT, SKIPPED = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"

Losses = dict[str, list[float]]


@dataclass(frozen=True)
class MeasuredWidths:
    """A model that nobody may change, its calibration, and what follows from them.

    plans: GPTQ with factors of a small rank; one linear is skipped. folder: for what is measured, once for all tests.
    """

    model: PreTrainedModel
    windows_WT: Tensor
    calibration: Artifact
    plans: Plans
    folder: Path

    @classmethod
    def of(cls, model: PreTrainedModel, windows_WT: Tensor, folder: Path) -> MeasuredWidths:
        plan = LinearPlan(QeraExact(), MXInt(3), rank=8, factor=MXInt(8, 8), rounding=Gptq())
        store, text = Store(folder / "store"), CalibrationText(windows_WT, 2, 8)
        calibration = store.obtain("calibrate", 0, lambda ws: calibrate(ws, resident(model), text, {Hessian()}))
        name, blocks = find_blocks(model)
        linears = [f"{name}.{i}.{linear}" for i, block in enumerate(blocks) for linear in block_linears(block)]
        return cls(model, windows_WT, calibration, {**dict.fromkeys(linears, plan), SKIPPED: None}, folder)

    @cached_property
    def choices(self) -> Choices:
        """One linear has a format of its own."""
        return {name: FORMATS for name, plan in self.plans.items() if plan is not None and name != OWN_FORMAT}

    @cached_property
    def shapes(self) -> Shapes:
        return {name: tuple(self.model.get_submodule(name).weight.shape) for name in self.plans}

    @cached_property
    def measurable(self) -> Plans:
        return plans_to_measure(self.plans, self.choices)

    @cached_property
    def losses(self) -> Losses:
        """Of every format alone."""
        return self.measure(self.folder / "alone", self.measurable)

    @cached_property
    def both_losses(self) -> Losses:
        """Of every format without A and B, and then with them."""
        return self.measure(self.folder / "both", plans_to_measure(self.plans, self.choices, optional_rank=True))

    def measure(
        self,
        folder: Path,
        plans: Plans,
        batch_size: int = 2,
        make: Callable[[Path], Workspace] = Workspace,
        calibration: Artifact | None = None,
    ) -> Losses:
        """The losses of every linear that has a plan, by linear and format."""
        workspace, statistics = make(folder), calibration or self.calibration
        runs = walk_backward(resident(self.model), self.windows_WT, batch_size, SEED)
        measure_widths(workspace, runs, statistics, plans, FORMATS)
        tensors = {name: x for i in range(BLOCKS) for name, x in workspace.tensors(block_file(i)).items()}
        assert all(name.endswith(".losses") for name in tensors)
        return {name.removesuffix(".losses"): losses_F.tolist() for name, losses_F in tensors.items()}
