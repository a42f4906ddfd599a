"""A model whose widths are measured and allocated: what each of its linears is quantized by, and may choose from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers import resident
from torch import Tensor
from transformers import PreTrainedModel

from lqer.formats import MXInt, NumberFormat
from lqer.methods import LinearPlan, QeraExact
from lqer.models.structure import block_linears, find_blocks
from lqer.rounding import Gptq
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText
from lqer.stages.measure_widths import Choices, measure_widths
from lqer.stages.plans import Plans
from lqer.statistics import Hessian
from lqer.store.names import block_file
from lqer.store.store import Artifact, Store, Workspace

BLOCKS, SEED = 3, 1
SIZES = {"num_hidden_layers": BLOCKS, "hidden_size": 64, "intermediate_size": 96}
FORMATS: tuple[NumberFormat, ...] = (MXInt(2), MXInt(3), MXInt(4))
OWN_FORMAT, SKIPPED = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"


def calibrated(model: PreTrainedModel, windows_WT: Tensor, folder: Path) -> Artifact:
    text = CalibrationText(windows_WT, 2, 8)
    return Store(folder).obtain("calibrate", 0, lambda ws: calibrate(ws, resident(model), text, {Hessian()}))


def plans_of(model: PreTrainedModel) -> dict[str, LinearPlan | None]:
    """GPTQ with factors of a small rank; one linear is skipped."""
    plan = LinearPlan(QeraExact(), MXInt(3), rank=8, factor=MXInt(8, 8), rounding=Gptq())
    name, blocks = find_blocks(model)
    plans: dict[str, LinearPlan | None] = {
        f"{name}.{i}.{linear}": plan for i, block in enumerate(blocks) for linear in block_linears(block)
    }
    return {**plans, SKIPPED: None}


def choices_of(plans: Plans) -> Choices:
    """One linear has a format of its own."""
    return {name: FORMATS for name, plan in plans.items() if plan is not None and name != OWN_FORMAT}


def measured(
    folder: Path,
    model: PreTrainedModel,
    calibration: Artifact,
    plans: Plans,
    windows_WT: Tensor,
    batch_size: int = 2,
    make: Callable[[Path], Workspace] = Workspace,
) -> dict[str, list[float]]:
    """The losses of every linear that has a plan, by linear and format."""
    workspace = make(folder)
    measure_widths(workspace, resident(model), calibration, plans, FORMATS, windows_WT, batch_size, SEED)
    tensors = {name: x for i in range(BLOCKS) for name, x in workspace.tensors(block_file(i)).items()}
    assert all(name.endswith(".losses") for name in tensors)
    return {name.removesuffix(".losses"): losses_F.tolist() for name, losses_F in tensors.items()}
