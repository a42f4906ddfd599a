"""One decoder block: its transforms one after another, then its linears rounded together (TesseraQ, OmniQuant, AWQ).

    transform   scales are folded into weights, norms and neighbours (AWQ); ranges are clipped, by search or by gradient
    round       under the resulting scales, every linear to nearest, or all of them together (adaptive)

Each linear's own method then reconstructs what rounding lost. Nothing here knows a path or another block.

Shapes: O out_features, I in_features, S sequences, T tokens, D hidden size, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lqer.formats import QuantizedTensor
from lqer.rounding.adaptive import Adaptive, AdaptiveState, block_loss, round_block
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_transform import BlockTransform, Progress, SaveState, no_progress, save_nothing

# A note of a block for which training ended worse than it started: the start was kept.
KEPT_START = "kept_start"
# A note by linear: the share of its codes that rounding together has changed.
CHANGED_CODES = "changed_codes"


def reconstruct_block(
    problem: BlockProblem,
    transforms: Sequence[BlockTransform],
    rounding: Adaptive | None,
    result: BlockResult | None = None,
    save_state: SaveState = save_nothing,
    progress: Progress = no_progress,
) -> BlockResult:
    """Transform a block and, with an adaptive rounding, round its linears together.

    Without a rounding, only linears whose scales a transform has fixed are rounded. result: saved by an earlier run of
    the same problem and parts, to resume from. save_state: called after every transform, epoch and round.

    A block whose output is worse than at the start of what was learned keeps that start, with a note `KEPT_START`.
    Raises DivergedError or another ArithmeticError if training diverges, ValueError for parts that do not fit together.
    """
    result = result or BlockResult()
    for index in range(result.finished, len(transforms)):
        transformed = transforms[index].apply(problem, result, progress, save_state)
        result = replace(transformed, finished=index + 1, part_state={})
        save_state(result)
    if rounding is not None:
        return _round_together(problem, rounding, result, progress, save_state)
    if result.rounded and any(transform.learning_bytes for transform in transforms):
        result = _unless_worse_than_nearest(problem, result)
    if result.rounded:
        return result.with_note("loss", {"end": output_loss(problem, result.parameters, result.rounded)})
    return result


def _unless_worse_than_nearest(problem: BlockProblem, result: BlockResult) -> BlockResult:
    """`result`, or rounding to nearest under unclipped scales, where training started, if training made it worse."""
    start = {linear: problem.formats[linear].quantize(result.weight(problem, linear)) for linear in result.rounded}
    if output_loss(problem, result.parameters, result.rounded) <= output_loss(problem, result.parameters, start):
        return result
    return replace(result, rounded=start).with_note(KEPT_START, True)


def _round_together(
    problem: BlockProblem, rounding: Adaptive, result: BlockResult, progress: Progress, save_state: SaveState
) -> BlockResult:
    """`result`, all of whose transforms are finished, with the linears rounded together."""
    weights = {linear: result.weight(problem, linear) for linear in problem.formats}
    starts = {
        linear: result.rounded.get(linear) or problem.formats[linear].quantize(weight_OI)
        for linear, weight_OI in weights.items()
    }
    state: AdaptiveState | None = None
    if result.part_state:
        state = AdaptiveState.from_tensors(result.part_state, problem.device)
    else:
        result = result.with_note("loss", {"start": output_loss(problem, result.parameters, starts)})
    losses = [] if state is None else state.losses.tolist()
    rounds = len(rounding.schedule(starts))
    progress("rounding", len(losses), rounds, losses[-1] if losses else None)

    def after_round(state: AdaptiveState) -> None:
        losses.append(float(state.losses[-1]))
        progress("rounding", state.rounds, rounds, losses[-1])
        save_state(replace(result, part_state=state.tensors()))

    found = round_block(
        {f"{linear}.weight": weight_OI for linear, weight_OI in weights.items()},
        {f"{linear}.weight": start for linear, start in starts.items()},
        problem.goal(result.parameters, rounding.both_targets),
        rounding,
        problem.seed,
        state,
        after_round,
    )
    rounded = {linear: found[f"{linear}.weight"] for linear in starts}
    start, end = result.notes["loss"]["start"], output_loss(problem, result.parameters, rounded)
    if not end <= start:
        result, rounded, end = result.with_note(KEPT_START, True), starts, start
    loss = {"start": start, "rounds": losses, "end": end}
    changed = {linear: changed_share(starts[linear], rounded[linear]) for linear in starts}
    result = replace(result, rounded=rounded, part_state={})
    return result.with_note("loss", loss).with_note(CHANGED_CODES, changed)


def changed_share(before: QuantizedTensor, after: QuantizedTensor) -> float:
    """The share of the codes that differ."""
    return float((before.parts["codes"] != after.parts["codes"]).to(torch.float32).mean())


@torch.no_grad()
def output_loss(
    problem: BlockProblem, parameters: Mapping[str, Tensor], rounded: Mapping[str, QuantizedTensor]
) -> float:
    """Squared error of the block's outputs per token, over all inputs.

    parameters: those that differ from the block's own, by name; rounded: weights of linears, by linear.
    """
    weights = {f"{linear}.weight": weight_OI.dequantize() for linear, weight_OI in rounded.items()}
    run = problem.with_parameters(parameters)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden_BTD, target_BTD = batch
        with problem.in_autocast():
            output_BTD = run(weights, hidden_BTD)
        return block_loss(output_BTD, target_BTD.to(problem.device)) * len(hidden_BTD)

    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    batches = zip(
        *(states_STD.split(problem.batch_size) for states_STD in (problem.inputs_STD, problem.targets_STD)), strict=True
    )
    for of_batch in problem.gang.each(batches, loss):
        total += of_batch
    return float(total) / len(problem.inputs_STD)
