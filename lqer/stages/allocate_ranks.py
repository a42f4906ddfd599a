"""Stage "spectra" and the ranks that follow from it: the rank of every linear under a budget of average bits.

The stage rounds every linear and stores the spectrum of its error under the method's metric, one safetensors file per
decoder block:
    <linear>.energies       (K,)  float64, squared singular values of the weighted error, descending
    <linear>.weight_energy  ()    float64, tr(W H Wᵀ), the energy of the layer's output under the same metric
    <linear>.weight_bits    ()    int64, the stored bits of the rounded weight
The objective is the sum over linears of the relative output error, Σ remaining energy / weight_energy, so that layers
count equally whatever the size of their inputs. The allocation itself (lqer/lowrank/rank_allocation.py) takes no time
and has no artifact: the ranks are part of the plans.

Shapes: O out_features, I in_features, K = min(I, O).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from lqer.errors import ConfigError, ModelError
from lqer.formats import NonFiniteError
from lqer.lowrank.exact import singular_values
from lqer.lowrank.rank_allocation import Allocation, Candidate, allocate, factor_bits, rank_step
from lqer.methods import LinearPlan, QuantizedWeight
from lqer.models.loaders import OpenedModel
from lqer.models.open import open_stored
from lqer.models.source import ModelSource
from lqer.models.structure import block_linears
from lqer.stages.base import Stage, no_effect
from lqer.stages.calibrate import Calibrate
from lqer.stages.gather import BlockStatistics, StatisticsOf
from lqer.stages.rotate import Rotate, source_of
from lqer.store.names import block_file
from lqer.store.store import Artifact, Store, Workspace

Plans = Mapping[str, LinearPlan | None]


def check_budget(plans: Plans, shapes: Mapping[str, tuple[int, int]], budget_bits: float) -> None:
    """Raise ConfigError where the weights' formats alone take more than the budget, before any work is done."""
    sizes = {name: shapes[name][0] * shapes[name][1] for name, plan in plans.items() if plan is not None}
    bits = sum(
        plan.weight.bits_per_value(shapes[name][1]) * sizes[name] for name, plan in plans.items() if plan is not None
    )
    if bits > budget_bits * sum(sizes.values()):
        raise _over_budget(bits / sum(sizes.values()), budget_bits)


def _over_budget(needed: float, budget_bits: float) -> ConfigError:
    return ConfigError(
        f"quantize.low_rank.budget_bits: must be at least {needed:.4g}, the bits of the weights and fixed ranks alone; "
        f"found {budget_bits:g}"
    )


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
        """The spectra that `plans` need; what they say of A and B does not matter to them."""
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

    Raises ModelError, naming the linear, where a weight is NaN or infinite or calibration never reached it.
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
    """weight_of: the name of its weight among the block's values by the full name of a linear."""
    tensors: dict[str, Tensor] = {}
    planned = [name for name in weight_of if plans[name] is not None]
    for full_name, site in statistics.by_site(planned, device):
        plan = plans[full_name]
        assert plan is not None
        weight_OI = values[weight_of[full_name]].to(device, torch.float32)
        try:
            spectrum = error_spectrum(weight_OI, site, plan)
        except NonFiniteError as error:
            raise ModelError(f"{full_name}: {error}") from None
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


@dataclass(frozen=True)
class BudgetedPlans:
    """Plans whose ranks follow from a budget of average bits, once the spectra are known."""

    plans: Plans
    spectra: MeasureSpectra
    budget_bits: float
    # (out_features, in_features) by linear.
    shapes: Mapping[str, tuple[int, int]] = field(metadata=no_effect("the model decides them"))
    blocks: int = field(metadata=no_effect("the model decides it"))

    def allocate(self, store: Store) -> Budget:
        """The plans with their ranks. Raises ConfigError where the fixed parts exceed the budget."""
        return allocate_ranks(self.plans, self.spectra.artifact(store), self.blocks, self.shapes, self.budget_bits)


@dataclass(frozen=True)
class Budget:
    """The plans with their ranks, and how they compare with a uniform rank."""

    plans: dict[str, LinearPlan | None]
    allocation: Allocation
    average_bits: float
    uniform_average_bits: float
    seconds: float

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest rank given."""
        ranks = self.allocation.ranks.values()
        return min(ranks, default=0), max(ranks, default=0)


def allocate_ranks(
    plans: Plans, spectra: Artifact, blocks: int, shapes: Mapping[str, tuple[int, int]], budget_bits: float
) -> Budget:
    """Give every plan without a rank one, so that the model's average bits come as close to the budget as fits.

    shapes: (out_features, in_features) by linear.
    Raises ConfigError where the weights and the ranks that are fixed take more than the budget already.
    """
    tensors = {key: value for i in range(blocks) for key, value in spectra.tensors(block_file(i)).items()}
    candidates: dict[str, Candidate] = {}
    weights, fixed_bits = 0, 0
    for name, plan in plans.items():
        if plan is None:
            continue
        out_features, in_features = shapes[name]
        weights += out_features * in_features
        fixed_bits += int(tensors[f"{name}.weight_bits"])
        bits = partial(factor_bits, plan.factor_formats, plan.factor_axes, in_features, out_features)
        if plan.rank is not None:
            fixed_bits += bits(min(plan.rank, in_features, out_features))
            continue
        energy = float(tensors[f"{name}.weight_energy"])
        candidates[name] = Candidate(
            tensors[f"{name}.energies"] / (energy if energy > 0 else 1.0), rank_step(plan.factor_formats), bits
        )
    budget = int(budget_bits * weights) - fixed_bits
    if budget < 0:
        raise _over_budget(fixed_bits / weights, budget_bits)
    allocation = allocate(candidates, budget)
    ranked = {
        name: plan and (plan if plan.rank is not None else replace(plan, rank=allocation.ranks[name]))
        for name, plan in plans.items()
    }
    return Budget(
        ranked,
        allocation,
        (fixed_bits + allocation.bits) / weights,
        (fixed_bits + allocation.uniform_bits) / weights,
        spectra.seconds,
    )
