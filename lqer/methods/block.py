"""One decoder block: its transforms in turn, then its linears rounded together (TesseraQ, OmniQuant, AWQ).

    transform   AWQ's scales go into the weights, norms and neighbours; ranges are clipped, searched or learnt
    round       under the scales so far, every linear to nearest or all of them together (adaptive)

What is left of each linear's error is its method's to reconstruct. Nothing here knows a path or another block.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqer.formats import QuantizedTensor
from lqer.rounding.adaptive import Adaptive, AdaptiveState, block_loss, round_block
from lqer.transforms.block_problem import BlockProblem, BlockTransform, Prepared, Progress, no_progress


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
    state: AdaptiveState | None = None,
    after_round: Callable[[AdaptiveState], None] = lambda state: None,
    progress: Progress = no_progress,
) -> TunedBlock:
    """Transform a block and, by an adaptive rounding, round its linears together.

    Without a rounding, only linears whose scales a transform has fixed are rounded. state, after_round: as for
    `round_block`. Raises DivergedError, ArithmeticError where learning diverges, and ValueError where parts do not fit.
    """
    prepared = Prepared()
    for transform in transforms:
        prepared = transform.apply(problem, prepared, progress)
    rounded = dict(prepared.starts)
    notes = dict(prepared.notes)
    if rounding is not None:
        weights = {linear: prepared.weight(problem, linear) for linear in problem.formats}
        starts = {
            linear: prepared.starts.get(linear) or problem.formats[linear].quantize(weight_OI)
            for linear, weight_OI in weights.items()
        }
        before = loss_of(problem, prepared.changed, starts)
        rounded, losses = _round_together(problem, prepared, starts, rounding, state, after_round, progress)
        notes["loss"] = {"start": before, "rounds": losses, "end": loss_of(problem, prepared.changed, rounded)}
    elif rounded:
        notes["loss"] = {"end": loss_of(problem, prepared.changed, rounded)}
    return TunedBlock(prepared.changed, rounded, notes)


def _round_together(
    problem: BlockProblem,
    prepared: Prepared,
    starts: Mapping[str, QuantizedTensor],
    rounding: Adaptive,
    state: AdaptiveState | None,
    after_round: Callable[[AdaptiveState], None],
    progress: Progress,
) -> tuple[dict[str, QuantizedTensor], list[float]]:
    """The linears by name, and the mean loss of every round."""
    bits = min(start.format.stream_widths["codes"] for start in starts.values())
    settings = rounding.settings(bits, problem.autocast, problem.seed)
    losses = [] if state is None else state.losses.tolist()

    def finish_round(reached: AdaptiveState) -> None:
        losses.append(float(reached.losses[-1]))
        progress("rounding", reached.rounds, len(settings.soft_shares), losses[-1])
        after_round(reached)

    rounded = round_block(
        {f"{linear}.weight": prepared.weight(problem, linear) for linear in starts},
        {f"{linear}.weight": start for linear, start in starts.items()},
        problem.with_changed(prepared.changed),
        problem.inputs_STD,
        problem.targets_STD,
        settings,
        state,
        finish_round,
    )
    return {linear: rounded[f"{linear}.weight"] for linear in starts}, losses


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
