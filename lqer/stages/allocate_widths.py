"""The width of every linear under a budget of average bits.

    minimise Σ_l Δ_l(p_l)    subject to    Σ_l b_l(p_l) ≤ budget · weights

over the options p_l of each linear l: its plan in every format it may have and, where A and B are a choice too, the
same without them. Δ_l(p) is what an option adds to the loss (measure_widths.py); b_l(p) all the bits that it stores:
codes and scales of the weight, signs of rotations, A and B.

    options     of each linear that has a choice; every other keeps its plan, whose bits come off the budget first
    curves      (b_l, Δ_l) by option; linears that are tied, as they share an input, get one option: their curves add up
    allocation  steps from the cheapest options, the largest gain per bit first (lqer/rounding/width_allocation.py)

It takes no time and has no artifact: the formats are part of the plans.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lqer.components import ADDED
from lqer.errors import ConfigError
from lqer.formats import NumberFormat
from lqer.lowrank.rank_allocation import factor_bits, row_bits
from lqer.methods import LinearPlan, Plans
from lqer.rounding.width_allocation import Allocation, Curve, allocate_widths, joined
from lqer.stages.base import no_effect
from lqer.stages.measure_widths import Choices, MeasureWidths
from lqer.stages.plans import BudgetedPlans, Shapes
from lqer.store.names import block_file, sites_file
from lqer.store.store import Store
from lqer.transforms.base import rotation_on

# The plans that each linear with a choice can get.
Options = Mapping[str, tuple[LinearPlan, ...]]


@dataclass(frozen=True)
class WidthPlans(BudgetedPlans):
    """Plans whose weight formats follow from a budget of average bits, once the losses are known.

    tied: whether linears that share an input get one format. low_rank: whether the plans keep A and B, whose bits are
    part of the budget all the same. optional_rank: whether a linear may do without A and B.
    """

    plans: Plans
    choices: Choices
    widths: MeasureWidths
    budget_bits: float
    tied: bool
    low_rank: bool
    shapes: Shapes = field(metadata=no_effect("the model decides them"))
    blocks: int = field(metadata=no_effect("the model decides it"))
    optional_rank: bool = field(default=False, metadata=ADDED)

    @property
    def names(self) -> list[str]:
        """The names of all that a linear can get, in the order of `Widths.counts`."""
        formats = [f"{one.kind} {one.nominal_bits:g} bits" for one in self.widths.formats]
        return formats + [f"{name} with A and B" for name in formats if self.optional_rank]

    def allocate(self, store: Store) -> Widths:
        """The plans with their formats. Raises ValueError where the narrowest of all exceed the budget."""
        losses, sites = self.widths.artifact(store), self.widths.calibration.artifact(store)
        tensors = {key: value for i in range(self.blocks) for key, value in losses.tensors(block_file(i)).items()}
        site_of = {name: site for i in range(self.blocks) for name, site in sites.json(sites_file(i)).items()}
        found = {name: tensors[f"{name}.losses"].tolist() for name in self.choices}
        options = options_of(self.plans, self.choices, self.optional_rank)
        ties = site_of if self.tied else followed(options, found, site_of)
        widths = allocate(self.plans, options, found, ties, self.shapes, self.budget_bits)
        widths = replace(widths, seconds=losses.seconds)
        if self.low_rank:
            return widths
        return replace(widths, plans={name: plan and plan.without_low_rank() for name, plan in widths.plans.items()})


@dataclass(frozen=True)
class Widths:
    """The plans with their formats, and how they compare with one format for all.

    counts: how many linears got each option, in the order of the formats; where A and B are a choice too, formats
    without them and then formats with them. seconds: how long measuring the losses took.
    """

    plans: Plans
    allocation: Allocation
    average_bits: float
    uniform_average_bits: float
    counts: tuple[int, ...]
    seconds: float = 0.0


def options_of(plans: Plans, choices: Choices, optional_rank: bool = False) -> Options:
    """Each plan in every format; with `optional_rank`, the same plans without A and B come first."""

    def options(plan: LinearPlan | None, formats: Sequence[NumberFormat]) -> tuple[LinearPlan, ...]:
        assert plan is not None, "a linear that has a choice"
        each = tuple(replace(plan, weight=one) for one in formats)
        return (*(replace(one, rank=0) for one in each), *each) if optional_rank else each

    return {name: options(plans[name], formats) for name, formats in choices.items()}


def followed(options: Options, losses: Mapping[str, Sequence[float]], sites: Mapping[str, str]) -> dict[str, str]:
    """For each linear that no gradient reaches, the one whose option it takes: the costliest of those with its input.

    An indexer chooses tokens, so its linears lose nothing by any format, and would get the narrowest. sites: by linear,
    the input that it shares with others.
    """
    leaders = {sites.get(name, name): name for name in sorted(losses, key=lambda name: max(losses[name]))}
    unreached = [name for name, of_options in losses.items() if not any(of_options)]
    found = {name: leaders[sites.get(name, name)] for name in unreached}
    return {name: leader for name, leader in found.items() if len(options[name]) == len(options[leader])}


def allocate(
    plans: Plans,
    options: Options,
    losses: Mapping[str, Sequence[float]],
    ties: Mapping[str, str],
    shapes: Shapes,
    budget_bits: float,
) -> Widths:
    """Give every linear that has a choice one of its options, so that all linears together stay within the budget.

    losses: nats per token, by linear and option. ties: the group of a linear, where the linears of a group get one
    format. budget_bits: per weight. Raises ValueError where the cheapest options exceed the budget.
    """
    weights, fixed = count_weights(plans, shapes), fixed_bits(plans, options, shapes)
    groups: dict[str, list[str]] = {}
    for name in options:
        groups.setdefault(ties.get(name, name), []).append(name)
    curves = {
        group: joined([curve_of(options[name], losses[name], shapes[name]) for name in names])
        for group, names in groups.items()
    }
    allocation = allocate_widths(curves, int(budget_bits * weights) - fixed)
    chosen = {name: options[name][allocation.chosen[group]] for group, names in groups.items() for name in names}
    return Widths(
        plans={**plans, **chosen},
        allocation=allocation,
        average_bits=(fixed + allocation.bits) / weights,
        uniform_average_bits=(fixed + allocation.uniform_bits) / weights,
        counts=_counts(options, chosen),
    )


def curve_of(options: Sequence[LinearPlan], losses: Sequence[float], shape: tuple[int, int]) -> Curve:
    """Bits and losses by option. A rank of 0 was measured once: with A and B it is the same as without."""
    bits = tuple(stored_bits(plan, *shape) for plan in options)
    return Curve(bits, tuple(losses) * (len(options) // len(losses)))


def _counts(options: Options, chosen: Mapping[str, LinearPlan]) -> tuple[int, ...]:
    """How many linears got each option. Of equal options the first counts: a plan of rank 0 is one without A and B."""
    counts = Counter(options[name].index(plan) for name, plan in chosen.items())
    return tuple(counts[i] for i in range(max(map(len, options.values()), default=0)))


def check_widths(plans: Plans, options: Options, shapes: Shapes, budget_bits: float) -> None:
    """Raise ConfigError where the narrowest formats take more than the budget, before any work is done."""
    narrowest = sum(min(stored_bits(plan, *shapes[name]) for plan in each) for name, each in options.items())
    least = (narrowest + fixed_bits(plans, options, shapes)) / count_weights(plans, shapes)
    if least > budget_bits:
        rule = f"must be at least {least:.4g}, the bits of the narrowest formats and of all that is fixed"
        raise ConfigError(f"quantize.budget_bits: {rule}; found {budget_bits:g}")


def count_weights(plans: Plans, shapes: Shapes) -> int:
    return sum(math.prod(shapes[name]) for name, plan in plans.items() if plan is not None)


def fixed_bits(plans: Plans, options: Options, shapes: Shapes) -> int:
    """The bits of linears that have no choice."""
    fixed = {name: plan for name, plan in plans.items() if plan is not None and name not in options}
    return sum(stored_bits(plan, *shapes[name]) for name, plan in fixed.items())


def stored_bits(plan: LinearPlan, out_features: int, in_features: int) -> int:
    """The bits of a linear as stored: its weight, the signs of its rotations, A and B."""
    bits = weight_bits(plan.weight, out_features, in_features)
    if plan.transform is not None:
        bits += rotation_on(plan.transform, out_features, in_features, plan.seed, torch.device("cpu")).bits
    rank = min(plan.rank or 0, out_features, in_features)
    return bits + factor_bits(plan.factor_formats, plan.factor_axes, in_features, out_features, rank)


def weight_bits(number_format: NumberFormat, out_features: int, in_features: int) -> int:
    """The bits of a weight as stored in a format; one scale of the whole tensor is left out."""
    if number_format.block_size == "tensor":
        return math.ceil(number_format.bits_per_value(in_features) * out_features * in_features)
    return row_bits(number_format, in_features) * out_features
