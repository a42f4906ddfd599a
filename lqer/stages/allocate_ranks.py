"""The rank of every linear under a budget of average bits.

    minimise Σ_l Σ_{i > r_l} σ_li² / tr(W_l H_l W_lᵀ)    subject to    Σ_l b_l(r_l) ≤ budget · weights

over the ranks r_l of the linears l that have none yet. σ_li are the singular values of the rounding error under the
method's metric (measure_spectra.py), so a linear's term is the relative error that its rank leaves in its output, and
linears count equally whatever the size of their inputs. b_l(r) are all the bits that a linear stores: its weight, A and
B. Fixed ranks come off the budget first; lqer/lowrank/rank_allocation.py takes the steps.

It takes no time and has no artifact: the ranks are part of the plans.

Shapes: K = min(I, O) of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from lqer.errors import ConfigError
from lqer.lowrank.rank_allocation import Allocation, Candidate, allocate, factor_bits, rank_step
from lqer.methods import Plans
from lqer.stages.base import no_effect
from lqer.stages.measure_spectra import MeasureSpectra
from lqer.stages.plans import BudgetedPlans, Shapes
from lqer.store.names import block_file
from lqer.store.store import Store


@dataclass(frozen=True)
class RankPlans(BudgetedPlans):
    """Plans whose ranks follow from a budget of average bits, once the spectra are known."""

    plans: Plans
    spectra: MeasureSpectra
    budget_bits: float
    shapes: Shapes = field(metadata=no_effect("the model decides them"))
    blocks: int = field(metadata=no_effect("the model decides it"))

    def allocate(self, store: Store) -> Ranks:
        """The plans with their ranks. Raises ConfigError where the fixed parts exceed the budget."""
        spectra = self.spectra.artifact(store)
        tensors = {key: value for i in range(self.blocks) for key, value in spectra.tensors(block_file(i)).items()}
        return replace(allocate_ranks(self.plans, tensors, self.shapes, self.budget_bits), seconds=spectra.seconds)


@dataclass(frozen=True)
class Ranks:
    """The plans with their ranks, and how they compare with a uniform rank.

    seconds: how long measuring the spectra took.
    """

    plans: Plans
    allocation: Allocation
    average_bits: float
    uniform_average_bits: float
    seconds: float = 0.0

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest rank given."""
        ranks = self.allocation.ranks.values()
        return min(ranks, default=0), max(ranks, default=0)


def allocate_ranks(plans: Plans, spectra: Mapping[str, Tensor], shapes: Shapes, budget_bits: float) -> Ranks:
    """Give every plan without a rank one, so that the model's average bits come as close to the budget as fits.

    spectra: the tensors of measure_spectra.py, of all blocks. budget_bits: per weight.
    Raises ConfigError where the weights and the ranks that are fixed take more than the budget already.
    """
    candidates: dict[str, Candidate] = {}
    weights, fixed_bits = 0, 0
    for name, plan in plans.items():
        if plan is None:
            continue
        out_features, in_features = shapes[name]
        weights += out_features * in_features
        fixed_bits += int(spectra[f"{name}.weight_bits"])
        bits = partial(factor_bits, plan.factor_formats, plan.factor_axes, in_features, out_features)
        if plan.rank is not None:
            fixed_bits += bits(min(plan.rank, in_features, out_features))
            continue
        energy = float(spectra[f"{name}.weight_energy"])
        relative_K = spectra[f"{name}.energies"] / (energy if energy > 0 else 1.0)
        candidates[name] = Candidate(relative_K, rank_step(plan.factor_formats), bits)
    budget = int(budget_bits * weights) - fixed_bits
    if budget < 0:
        raise _over_budget(fixed_bits / weights, budget_bits)
    allocation = allocate(candidates, budget)
    ranked = {
        name: plan and (plan if plan.rank is not None else replace(plan, rank=allocation.ranks[name]))
        for name, plan in plans.items()
    }
    return Ranks(
        plans=ranked,
        allocation=allocation,
        average_bits=(fixed_bits + allocation.bits) / weights,
        uniform_average_bits=(fixed_bits + allocation.uniform_bits) / weights,
    )


def check_ranks(plans: Plans, shapes: Shapes, budget_bits: float) -> None:
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
