"""Stage "widths": what every weight format adds to the loss in every linear that has a choice.

What a format f in a linear l adds to the model's loss is measured on the original model, to second order. With an error
E of the weight, inputs x_t of a window w and gradients g_t = ∂L/∂y_t of the original's loss on it with respect to the
linear's outputs

    Δ_l(f) = ½ Σ_w Σ_o ⟨E_o, (G_w)_o⟩²  /  tokens,      G_w = Σ_t g_t x_tᵀ = ∂L/∂W         nats per token

the divergence from the original for errors that are small and, from row to row and linear to linear, independent of
each other (lqer/models/backward.py says which loss). Those of a window's tokens are not: all come from the same E. E is
that of the plan's own rounding under its statistics, on a sample of the output rows, or drawn from the law of such
errors (width_errors.py); a linear that is rotated is measured in its rotated basis. Experts are rounded in batches, as
when they are quantized, and on fewer rows: a layer has hundreds of their linears. The stage stores, in a safetensors
file per decoder block, `<linear>.losses` (F,) float64 in the order of the formats, and where A and B are a choice too,
F more for the formats with them. lqer/stages/allocate_widths.py chooses by them.

Shapes: O out_features, I in_features, S sampled rows, B windows of a call, N tokens of each, F formats, W windows, T
tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from lqer.formats import NumberFormat
from lqer.formats.base import check_finite
from lqer.methods import LinearPlan, Plans
from lqer.models.backward import BackwardRun, Visit, walk_backward
from lqer.models.source import ModelSource
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears
from lqer.phases import in_phase, phase
from lqer.stages.alike import batches_of, with_statistics
from lqer.stages.at_fault import one_named
from lqer.stages.base import Stage, no_effect
from lqer.stages.calibrate import Calibrate
from lqer.stages.gather import BlockStatistics
from lqer.stages.rotate import Rotate, source_of
from lqer.stages.width_errors import EXPERT_ROWS, SAMPLED_ROWS, Sampled, errors_of
from lqer.statistics.site import SiteStatistics
from lqer.store.names import block_file
from lqer.store.offload import Offload
from lqer.store.store import Artifact, Store, Workspace
from lqer.transforms import Rotation

WINDOWS = 8  # of the calibration text, that gradients are taken on

# The formats that a linear chooses from; linears that are not in it keep the format of their plan.
Choices = Mapping[str, tuple[NumberFormat, ...]]


@dataclass(frozen=True)
class MeasureWidths(Stage):
    """What every format adds to the loss in every linear that has a choice."""

    name: ClassVar[str] = "widths"
    version: ClassVar[int] = 5

    model: ModelSource | Rotate
    calibration: Calibrate
    plans: Plans
    formats: tuple[NumberFormat, ...]
    windows_WT: Tensor
    batch_size: int
    seed: int
    dtype: torch.dtype
    device: torch.device
    offload: Offload = field(metadata=no_effect("it decides where numbers are stored, not their values"))

    def build(self, workspace: Workspace, store: Store) -> None:
        opened = open_model(source_of(self.model, store), self.dtype, self.device, self.offload)
        runs = walk_backward(opened, self.windows_WT, self.batch_size, self.seed)
        shown = tqdm(runs, total=len(opened.blocks), desc="widths", unit="block")
        measure_widths(workspace, shown, self.calibration.artifact(store), self.plans, self.formats)


def plans_to_measure(plans: Plans, choices: Choices, optional_rank: bool = False) -> Plans:
    """The plans with only what decides the errors of rounding, and what A and B leave of them where these are a choice.

    None for linears without a choice.
    """
    return {
        name: None if plan is None or name not in choices else replace(
            plan if optional_rank else plan.without_low_rank(),
            weight=choices[name][0], activation=None, bias=None, asymmetric=0.0,
        )
        for name, plan in plans.items()
    }  # fmt: skip


@in_phase("widths")
def measure_widths(
    workspace: Workspace,
    runs: Iterable[BackwardRun],
    calibration: Artifact,
    plans: Plans,
    formats: Sequence[NumberFormat],
) -> None:
    """Write the losses of every block that `workspace` does not hold yet.

    runs: of all blocks, last to first (`walk_backward`).
    Raises ModelError, naming the linear, where a weight or its statistics cannot be used, or calibration never reached
    it.
    """
    for run in runs:
        if block_file(run.index) in workspace:
            run.backward({})
            continue
        statistics = BlockStatistics.read(calibration, run.index)
        tensors, visits = _block_visits(run, statistics, plans, formats)
        del statistics
        run.backward(visits)
        workspace.write_tensors(block_file(run.index), tensors)


def _block_visits(
    run: BackwardRun, statistics: BlockStatistics, plans: Plans, formats: Sequence[NumberFormat]
) -> tuple[dict[str, Tensor], dict[str, Visit]]:
    """The losses of a block's linears, zero still, and the visits that add to them."""
    tensors: dict[str, Tensor] = {}
    visits: dict[str, Visit] = {}
    tokens = run.gradients_WTD.shape[:2].numel()
    for batch in _sampled(run, statistics, plans):
        with phase("round"):
            errors = one_named(partial(errors_of, formats=formats), batch, lambda linear: linear.name)
        for one, errors_F in zip(batch, errors, strict=True):
            # On the device: each visit would otherwise wait for it.
            losses_F = torch.zeros(len(errors_F), dtype=torch.float64, device=run.run.device)
            tensors[f"{one.name}.losses"] = losses_F
            scale = len(one.target.weight_OI) / len(one.rows_S) / tokens
            visit = partial(_add_losses, losses_F, one.target.rotation, one.rows_S, errors_F, scale)
            visits[one.name.removeprefix(f"{run.run.name}.")] = visit
    return tensors, visits


def _sampled(run: BackwardRun, statistics: BlockStatistics, plans: Plans) -> Iterator[list[Sampled]]:
    """The planned linears of a block, in the batches that are rounded at once: those of a site, or experts alike."""
    linears = {f"{run.run.name}.{name}": linear for name, linear in block_linears(run.run.block).items()}
    planned = [name for name in linears if plans[name] is not None]
    device, shapes = run.run.device, {name: linear.weight.shape for name, linear in linears.items()}
    batches = with_statistics(batches_of(planned, statistics, plans, shapes, device), statistics, device)
    for _, members in groupby(batches, key=lambda batch: id(batch[0][1])):
        found = []
        for batch in members:
            name, _ = batch[0]
            plan, most = plans[name], SAMPLED_ROWS if statistics.routed_tokens(name) is None else EXPERT_ROWS
            assert plan is not None
            of_batch = [(name, linears[name].weight.detach().to(device, torch.float32), site) for name, site in batch]
            found += one_named(partial(_sampled_rows, plan=plan, most=most), of_batch, lambda linear: linear[0])
        yield found


def _sampled_rows(linears: Sequence[tuple[str, Tensor, SiteStatistics]], plan: LinearPlan, most: int) -> list[Sampled]:
    """The sampled rows of linears of one shape and plan, each given by its name, weight (O, I) and statistics."""
    names, weights, sites = zip(*linears, strict=True)
    check_finite(*weights)
    targets = plan.method.targets(weights, sites, plan)
    return [Sampled.of(name, plan, target, most) for name, target in zip(names, targets, strict=True)]


def _add_losses(
    losses_F: Tensor,
    rotation: Rotation | None,
    rows_S: Tensor,
    errors: Sequence[Tensor],
    scale: float,
    x_BNI: Tensor,
    g_BNO: Tensor,
) -> None:
    x_BNI, g_BNO = x_BNI.to(torch.float32), g_BNO.to(torch.float32)
    if rotation is not None:
        x_BNI, g_BNO = rotation.input(x_BNI), rotation.output_gradient(g_BNO)
    losses_F += scale * added_losses(x_BNI, g_BNO[..., rows_S], errors)


def added_losses(x_BNI: Tensor, g_BNS: Tensor, errors: Sequence[Tensor]) -> Tensor:
    """½ Σ_b Σ_s ⟨E_s, G_bs⟩² of each error E (S, I), float64 (F,); G_b = Σ_n g_bn x_bnᵀ."""
    gradient_BSI = g_BNS.mT @ x_BNI
    products = [(gradient_BSI * error_SI).sum(2).square().sum(dtype=torch.float64) for error_SI in errors]
    return 0.5 * torch.stack(products)
