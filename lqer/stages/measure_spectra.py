"""Stage "spectra": what every rank of A and B would leave of the rounding error in every linear.

Every linear is rounded, and the spectrum of its error under the method's metric stored, one safetensors file per
decoder block:
    <linear>.energies       (K,)  float64, squared singular values of the weighted error, descending
    <linear>.weight_energy  ()    float64, tr(W H Wᵀ), the energy of the layer's output under the same metric
    <linear>.weight_bits    ()    int64, the stored bits of the rounded weight
lqer/stages/allocate_ranks.py chooses by them.

Shapes: O out_features, I in_features, K = min(I, O).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from lqer.lowrank.exact import singular_values
from lqer.methods import LinearPlan, Plans, QuantizedWeight
from lqer.models.loaders import OpenedModel
from lqer.models.open import open_stored
from lqer.models.source import ModelSource
from lqer.models.structure import block_linears
from lqer.stages.at_fault import named
from lqer.stages.base import Stage
from lqer.stages.calibrate import Calibrate
from lqer.stages.gather import BlockStatistics, StatisticsOf
from lqer.stages.rotate import Rotate, source_of
from lqer.store.names import block_file
from lqer.store.store import Store, Workspace


@dataclass(frozen=True)
class MeasureSpectra(Stage):
    """The spectrum of every linear's rounding error under the metric of its method."""

    name: ClassVar[str] = "spectra"
    version: ClassVar[int] = 1

    model: ModelSource | Rotate
    calibration: Calibrate
    plans: Plans
    device: torch.device

    @classmethod
    def of(cls, calibration: Calibrate, plans: Plans) -> MeasureSpectra:
        """The spectra that `plans` need, whatever they say of A and B."""
        return cls(
            calibration.model,
            calibration,
            {name: plan and plan.without_factors() for name, plan in plans.items()},
            calibration.device,
        )

    def build(self, workspace: Workspace, store: Store) -> None:
        opened = open_stored(source_of(self.model, store), self.device)
        measure_spectra(workspace, opened, self.calibration.of_blocks(store), self.plans)


def measure_spectra(workspace: Workspace, opened: OpenedModel, statistics_of: StatisticsOf, plans: Plans) -> None:
    """Write the spectra of every block that `workspace` does not hold yet.

    Raises ModelError, naming the linear, where a weight or its statistics cannot be used, or calibration never reached
    it.
    """
    total, device = len(opened.blocks), opened.device
    missing = [index for index in range(total) if block_file(index) not in workspace]
    found = statistics_of(missing)
    visits = opened.loader.values_of_each(opened.blocks, missing)
    for index, values in tqdm(visits, initial=total - len(missing), total=total, desc="spectra", unit="block"):
        name = f"{opened.name}.{index}"
        linears = [f"{name}.{linear}" for linear in block_linears(opened.blocks[index])]
        weight_of = {linear: f"{linear.removeprefix(f'{name}.')}.weight" for linear in linears}
        workspace.write_tensors(block_file(index), _block_spectra(weight_of, values, next(found), plans, device))


def _block_spectra(
    weight_of: Mapping[str, str],
    values: Mapping[str, Tensor],
    statistics: BlockStatistics,
    plans: Plans,
    device: torch.device,
) -> dict[str, Tensor]:
    """The tensors of one block. weight_of: by full name of a linear, its weight's name among the block's values."""
    tensors: dict[str, Tensor] = {}
    planned = [name for name in weight_of if plans[name] is not None]
    for full_name, site in statistics.by_site(planned, device):
        plan = plans[full_name]
        assert plan is not None
        weight_OI = values[weight_of[full_name]].to(device, torch.float32)
        with named(full_name):
            spectrum = error_spectrum(weight_OI, site, plan)
        tensors |= {f"{full_name}.{key}": tensor for key, tensor in spectrum.items()}
    return tensors


def error_spectrum(weight_OI: Tensor, statistics: Mapping[str, Tensor], plan: LinearPlan) -> dict[str, Tensor]:
    """The stored tensors of one linear; see the module's docstring."""
    target = plan.method.target(weight_OI, statistics, plan)
    rounded = plan.rounding.round(target.weight_OI, target.statistics, plan.weight)
    metric = plan.method.metric(target.weight_OI, target.statistics)
    weight = QuantizedWeight(rounded, None, target.rotation)
    return {
        "energies": singular_values(target.weight_OI - rounded.dequantize(), metric).square(),
        "weight_energy": torch.tensor(metric.energy(target.weight_OI), dtype=torch.float64),
        "weight_bits": torch.tensor(rounded.code_bits + weight.metadata_bits),
    }
