"""One decoder block: its transforms in turn, then its linears rounded together (TesseraQ, OmniQuant, AWQ).

    transform   AWQ's scales go into the weights, norms and neighbours; ranges are clipped, searched or learnt
    round       under the scales so far, every linear to nearest or all of them together (adaptive)

What is left of each linear's error is its method's to reconstruct. Nothing here knows a path or another block.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lqer.formats import QuantizedTensor
from lqer.methods.block_state import BlockState
from lqer.rounding.adaptive import Adaptive, AdaptiveState, block_loss, round_block
from lqer.transforms.block_problem import (
    BlockProblem,
    BlockTransform,
    Progress,
    Session,
    keep_nothing,
    no_progress,
)


@dataclass(frozen=True)
class TunedBlock:
    """What a block becomes: parameters that changed, by their names within it; weights rounded already, by linear.

    Weights of linears are in float32, as they were rounded. notes: what was found on the way, as JSON can hold it.
    """

    parameters: Mapping[str, Tensor]
    rounded: Mapping[str, QuantizedTensor]
    notes: Mapping[str, Any]


def tune_block(
    problem: BlockProblem,
    transforms: Sequence[BlockTransform],
    rounding: Adaptive | None,
    state: BlockState | None = None,
    keep: Callable[[BlockState], None] = keep_nothing,
    progress: Progress = no_progress,
) -> TunedBlock:
    """Transform a block and, by an adaptive rounding, round its linears together.

    Without a rounding, only linears whose scales a transform has fixed are rounded. state: that of an earlier run of
    the same problem and parts, to go on from; `keep` gets it after every transform, epoch and round. Raises
    DivergedError, ArithmeticError where learning diverges, and ValueError where parts do not fit.
    """
    state = state or BlockState()
    for place in range(state.finished, len(transforms)):
        session = Session(progress, state.learnt or None, _keeping(keep, state))
        state = BlockState(transforms[place].apply(problem, state.prepared, session), place + 1)
        keep(state)
    if rounding is not None:
        return _round_together(problem, rounding, state, keep, progress)
    prepared = state.prepared
    if prepared.starts:
        prepared = prepared.noted("loss", {"end": loss_of(problem, prepared.changed, prepared.starts)})
    return TunedBlock(prepared.changed, prepared.starts, prepared.notes)


def _keeping(keep: Callable[[BlockState], None], state: BlockState) -> Callable[[Mapping[str, Tensor]], None]:
    """`keep` for the part that comes after what is finished in `state`."""
    return lambda learnt: keep(replace(state, learnt=learnt))


def _round_together(
    problem: BlockProblem,
    rounding: Adaptive,
    state: BlockState,
    keep: Callable[[BlockState], None],
    progress: Progress,
) -> TunedBlock:
    """The block whose transforms are done, and its linears rounded together."""
    prepared = state.prepared
    weights = {linear: prepared.weight(problem, linear) for linear in problem.formats}
    starts = {
        linear: prepared.starts.get(linear) or problem.formats[linear].quantize(weight_OI)
        for linear, weight_OI in weights.items()
    }
    if not state.learnt:
        prepared = prepared.noted("loss", {"start": loss_of(problem, prepared.changed, starts)})
        state = replace(state, prepared=prepared)
    reached = AdaptiveState.from_tensors(state.learnt, problem.device) if state.learnt else None
    losses = [] if reached is None else reached.losses.tolist()
    bits = min(start.format.stream_widths["codes"] for start in starts.values())
    settings = rounding.settings(bits, problem.autocast, problem.seed)
    keep_learnt = _keeping(keep, state)

    def after_round(reached: AdaptiveState) -> None:
        losses.append(float(reached.losses[-1]))
        progress("rounding", reached.rounds, len(settings.soft_shares), losses[-1])
        keep_learnt(reached.tensors())

    found = round_block(
        {f"{linear}.weight": weight_OI for linear, weight_OI in weights.items()},
        {f"{linear}.weight": start for linear, start in starts.items()},
        problem.with_changed(prepared.changed),
        problem.inputs_STD,
        problem.targets_STD,
        settings,
        reached,
        after_round,
    )
    rounded = {linear: found[f"{linear}.weight"] for linear in starts}
    loss = {**prepared.notes["loss"], "rounds": losses, "end": loss_of(problem, prepared.changed, rounded)}
    return TunedBlock(prepared.changed, rounded, prepared.noted("loss", loss).notes)


@torch.no_grad()
def loss_of(problem: BlockProblem, changed: Mapping[str, Tensor], rounded: Mapping[str, QuantizedTensor]) -> float:
    """The squared error of the block's outputs per token, over all inputs, under these weights of its linears."""
    weights = {f"{linear}.weight": weight_OI.dequantize() for linear, weight_OI in rounded.items()}
    run = problem.with_changed(changed)
    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    pairs = zip(
        *(states.split(problem.batch_size) for states in (problem.inputs_STD, problem.targets_STD)), strict=True
    )
    for hidden_BTD, target_BTD in pairs:
        with problem.in_autocast():
            output_BTD = run(weights, hidden_BTD)
        total += block_loss(output_BTD, target_BTD.to(problem.device)) * len(hidden_BTD)
    return float(total) / len(problem.inputs_STD)
