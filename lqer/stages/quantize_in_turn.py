"""The linears of one decoder block, quantized on inputs that the quantized model computes before them.

In the order "block", all linears of a block see inputs from its unrounded weights (GPTVQ, arXiv 2402.15319). In the
order "sequential" (GPTQ's "true sequential") they take turns:

    for every turn (q k v | o | gate up | down), in the order of their calls:
        gather statistics of these linears' inputs, the linears of the turns before it quantized
        quantize them

A turn are linears that share an input; those of a mixture's experts, whose names differ by a number alone, take theirs
together. For every turn the block runs once more, in emulation and with rounded activations where linears have them,
but not beyond the inputs of the turn.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

from lqer.checkpoint.load import fill_block
from lqer.methods import Plans
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun
from lqer.stages.block_work import BlockWork, QuantizedLinears
from lqer.stages.gather import CalibrationText, observe_parts
from lqer.stages.observe import NOT_ROUNDED
from lqer.stages.quantize_linears import QuantizeSettings, input_roundings, quantize_linears, requested_statistics
from lqer.transforms.tracing import trace


def quantize_block(
    run: BlockRun,
    original: BlockRun | None,
    text: CalibrationText,
    work: BlockWork,
    settings: QuantizeSettings,
    in_place: bool = False,
) -> QuantizedLinears:
    """Quantize the linears of a block with error propagation, in the order of the settings.

    run: the unrounded block on the quantized model's hidden states. original: the same on the original model's, where
    statistics or token weights need that. in_place: whether linears that take turns may replace those of the block,
    whose weights are then not held any longer; else it is left as it is.
    """
    plans = {name: settings.plans[f"{work.name}.{name}"] for name in work.linears}
    if settings.order == "block":
        found = _Linears(run, original, text, work, settings).quantized(plans)
    else:
        turned = run if in_place else run.with_block(copy.deepcopy(run.block))
        found = _Linears(turned, original, text, work, settings).quantized_in_turn(plans)
    # Whatever the order of turns, and of passes over the text.
    found.sort(work.full_names(work.linears))
    return found


@dataclass(frozen=True)
class _Linears:
    """The linears of a block, and what they are quantized on; arguments as of `quantize_block`."""

    run: BlockRun
    original: BlockRun | None
    text: CalibrationText
    work: BlockWork
    settings: QuantizeSettings

    def quantized(self, plans: Plans) -> QuantizedLinears:
        """Those of `plans`, on statistics of their inputs; experts as soon as their statistics are gathered."""
        run, settings = self.run, self.settings
        roundings = input_roundings(plans) if settings.round_inputs else NOT_ROUNDED
        found, requested = QuantizedLinears(), requested_statistics(plans)
        passes = observe_parts(run, self.original, self.text, requested, roundings=roundings, linears=list(plans))
        for names, statistics in passes:
            found.add(quantize_linears(self.work, names, statistics, settings, run.device, run.hidden.gang))
            del statistics
        return found

    def quantized_in_turn(self, plans: Plans) -> QuantizedLinears:
        """Those of `plans`, turn by turn. In the block of `run` they are replaced, all but those of the last turn."""
        # Which experts a batch reaches depends on the rank.
        found, turns = QuantizedLinears(), self.run.hidden.gang.of_first(turns_of(self.run))
        for turn in turns:
            planned = {name: plans[name] for name in turn if plans[name] is not None}
            if not planned:
                continue
            of_turn = self.quantized(planned)
            if turn != turns[-1]:
                _put_in_place(self.run, of_turn, self.work)
            found.add(of_turn)
        return found


def turns_of(run: BlockRun) -> list[list[str]]:
    """The linears of a block by turn, found by running one batch; what that does not reach comes last, but experts."""
    turns: dict[str, list[str]] = {}
    turn_of: dict[str, str] = {}
    linears = block_linears(run.block)
    # Routers, and what else is kept, are traced too.
    traced = ([name for name in site if name in linears] for site in trace(run.block, lambda: run.output(0)).sites())
    reached = [site for site in traced if site]
    seen = {name for site in reached for name in site}
    for site in [*reached, *([name] for name in linears if name not in seen)]:
        kinds = [re.sub(r"\d+", "#", name) for name in site]
        turn = turn_of.setdefault(kinds[0], kinds[0])
        turn_of |= dict.fromkeys(kinds, turn)
        turns.setdefault(turn, []).extend(site)
    return list(turns.values())


def _put_in_place(run: BlockRun, found: QuantizedLinears, work: BlockWork) -> None:
    """Let quantized linears compute what comes after them, as they will in the checkpoint."""
    prefix = f"{work.name}."
    entries = {row["name"].removeprefix(prefix): row["entry"] for row in found.rows}
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.tensors.items()}
    for name in entries:
        if f"{name}.bias" in work.tensors and f"{prefix}{name}.bias" not in found.replaced:
            tensors[f"{name}.bias"] = work.tensors[f"{name}.bias"]
    fill_block(run.block, tensors, entries, run.device, run.hidden.states_WTD.dtype, "emulate")
