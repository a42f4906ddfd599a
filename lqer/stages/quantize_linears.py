"""Linears of a decoder block, quantized by their plans on statistics of their inputs: what all ways to a checkpoint do.

Their packed tensors, and a row of each (bits, ranks, errors), go into the block's files (lqer/stages/block_work.py).

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lqer.checkpoint.pack import describe_linear, pack_linears
from lqer.formats import QuantizedTensor
from lqer.methods import LinearPlan, Plans, QuantizedWeight
from lqer.phases import in_phase, phase
from lqer.stages.alike import batches_of, with_statistics
from lqer.stages.at_fault import AT_FAULT, named
from lqer.stages.block_work import BlockWork, QuantizedLinears, all_spectra, found_already
from lqer.stages.gather import BlockStatistics
from lqer.stages.layer_rows import later_spectra, layer_row, rounded_alone, with_numbers
from lqer.stages.observe import InputRoundings
from lqer.statistics import ALONE, ALWAYS, Gang, Statistic
from lqer.statistics.site import SiteStatistics
from lqer.transforms import BlockTransform

# Whether the linears of a block are quantized on inputs from its unrounded weights, or one input site after the other.
Order = Literal["block", "sequential"]


@dataclass(frozen=True)
class QuantizeSettings:
    """Plans by linear (None for a skipped one), the format of attention operands, the transforms of whole blocks.

    round_inputs: whether statistics that are gathered on the way are of inputs as the quantized linears round them.
    order: of error propagation within a block, see lqer/stages/quantize_in_turn.py.
    """

    plans: Plans
    attention: Mapping[str, Any] | None
    seed: int
    transforms: tuple[BlockTransform, ...] = ()
    round_inputs: bool = False
    order: Order = "block"


def requested_statistics(plans: Plans) -> frozenset[Statistic]:
    """The statistics besides `ALWAYS` that some linear's method, rounding or transform asks for."""
    needed = (plan.method.statistics_for(plan) for plan in plans.values() if plan is not None)
    return frozenset().union(*needed) - frozenset(ALWAYS)


def input_roundings(plans: Plans) -> InputRoundings:
    """How the linears round their inputs, of those that do."""
    roundings = {name: plan.input_rounding for name, plan in plans.items() if plan is not None}
    return {name: rounding for name, rounding in roundings.items() if rounding is not None}


def quantize_linears(
    work: BlockWork,
    linears: Collection[str],
    statistics: BlockStatistics,
    settings: QuantizeSettings,
    device: torch.device,
    gang: Gang = ALONE,
) -> QuantizedLinears:
    """Quantize some linears of a block, those that have a plan. Raises ModelError, naming the linear.

    Experts are quantized in batches (lqer/stages/alike.py). The ranks of a gang deal the batches out, and all get all
    linears.
    """
    found, full_names = QuantizedLinears(), work.full_names(linears)
    shapes = dict(zip(full_names, (work.linears[name] for name in linears), strict=True))
    planned = [name for name in full_names if settings.plans[name] is not None]
    batches = batches_of(planned, statistics, settings.plans, shapes, device)
    ours = gang.deal({batch[0]: sum(_length(shapes[name]) for name in batch) for batch in batches})
    of_ours = _quantize_ours(work, [batch for batch in batches if batch[0] in ours], statistics, settings, device)
    if gang.size == 1:
        found.add(of_ours)
    else:
        # Between processes values travel.
        parts = (of_ours.tensors, of_ours.replaced, of_ours.rows, all_spectra(of_ours.spectra))
        for tensors, replaced, rows, spectra in gang.gathered(parts):
            found.add(QuantizedLinears(tensors, replaced, rows, found_already(spectra)))
    found.sort(full_names)
    return found


def _length(shape: torch.Size) -> float:
    """How long a linear takes, compared with others: updates of the columns behind each column."""
    return float(shape.numel() * shape[-1])


def _quantize_ours(
    work: BlockWork,
    batches: Sequence[list[str]],
    statistics: BlockStatistics,
    settings: QuantizeSettings,
    device: torch.device,
) -> QuantizedLinears:
    found = QuantizedLinears()
    for batch in with_statistics(batches, statistics, device):
        # For methods that draw: whatever has been quantized here before.
        torch.manual_seed(settings.seed)
        plan = settings.plans[batch[0][0]]
        assert plan is not None
        weights = [_stored_weight(work, full_name, device) for full_name, _ in batch]
        quantized, names = _quantize_batch(work, batch, weights, plan), [full_name for full_name, _ in batch]
        with phase("pack"):
            found.tensors.update(pack_linears(names, quantized, [_bias(work, name, plan) for name in names]))
        for (full_name, site), weight_OI, weight in zip(batch, weights, quantized, strict=True):
            routed_tokens = statistics.routed_tokens(full_name)
            found.add(_described(work, full_name, site, weight_OI, weight, plan, routed_tokens))
    return replace(found, rows=with_numbers(found.rows))


@in_phase("read")
def _stored_weight(work: BlockWork, full_name: str, device: torch.device) -> Tensor:
    # In two steps: in one, the CPU would widen the values, and the GPU wait for twice as many bytes.
    return work.weight(full_name).to(device, non_blocking=True).to(torch.float32)


@in_phase("round")
def _quantize_batch(
    work: BlockWork, batch: Sequence[tuple[str, SiteStatistics]], weights: Sequence[Tensor], plan: LinearPlan
) -> list[QuantizedWeight]:
    rounded = [work.rounded_weight(full_name) for full_name, _ in batch]
    if len(batch) > 1 and not any(rounded):
        try:
            return plan.quantize_together(weights, [site for _, site in batch])
        except AT_FAULT:
            # One of them; alone it is named.
            pass
    return [
        _quantize_weight(full_name, weight_OI, site, plan, one)
        for (full_name, site), weight_OI, one in zip(batch, weights, rounded, strict=True)
    ]


def _quantize_weight(
    full_name: str, weight_OI: Tensor, site: SiteStatistics, plan: LinearPlan, rounded: QuantizedTensor | None
) -> QuantizedWeight:
    with named(full_name):
        if rounded is None:
            return plan.quantize(weight_OI, site)
        return plan.method.reconstruct_error(weight_OI, rounded, site, plan)


def _bias(work: BlockWork, full_name: str, plan: LinearPlan) -> QuantizedTensor | None:
    """The bias in the plan's format; None where there is no bias, or no format. Raises ModelError."""
    bias_O = work.bias(full_name)
    if bias_O is None or plan.bias is None:
        return None
    with named(full_name):
        return plan.bias.quantize(bias_O)


def _described(
    work: BlockWork,
    full_name: str,
    site: SiteStatistics,
    weight_OI: Tensor,
    weight: QuantizedWeight,
    plan: LinearPlan,
    routed_tokens: int | None,
) -> QuantizedLinears:
    """What is written of one linear beside its packed tensors. routed_tokens: to its expert; None for other linears."""
    has_bias = work.bias(full_name) is not None
    replaced = {f"{full_name}.weight"} | ({f"{full_name}.bias"} if has_bias and plan.bias is not None else set())
    found = QuantizedLinears(replaced=replaced)
    entry = describe_linear(plan, weight, has_bias)
    rounded_OI = rounded_alone(weight_OI, weight, site, plan)
    of_expert = {} if routed_tokens is None else {"routed_tokens": routed_tokens}
    found.rows.append(layer_row(full_name, weight_OI, rounded_OI, weight, site) | of_expert | {"entry": entry})
    # Among a layer's experts, only the first one has spectra.
    if work.with_spectra and (not of_expert or full_name.rsplit(".", 2)[1] == "0"):
        at_once = not work.finds_spectra_later
        found.spectra.append(later_spectra(full_name, weight_OI, rounded_OI, site, at_once))
    return found
