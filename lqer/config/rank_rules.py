"""Rules of ranks, widths and their budgets; lqer/config/rules.py has the others, and their order."""

from __future__ import annotations

from collections.abc import Iterator

from lqer.config.quantize import QuantizeConfig
from lqer.config.rule import KeyedError
from lqer.config.schema import Config
from lqer.config.section import Loc


def ranks_are_reconstructed(config: Config) -> Iterator[KeyedError]:
    """A rank, a budget or iterations are set only for a method that reconstructs."""
    quantize, method, table = config.quantize, config.quantize.method, ("quantize", "low_rank")
    if method.reconstructs:
        return
    nothing = f'method "{method.kind}" has no low-rank factors'
    ranks: dict[Loc, int | None] = {(*table, "rank"): quantize.low_rank.rank}
    for i, override in enumerate(quantize.override):
        if override.low_rank:
            ranks["quantize", "override", i, "low_rank", "rank"] = override.low_rank.rank
    for loc, rank in ranks.items():
        if rank:
            yield KeyedError(loc, f"must be 0: {nothing}", rank)
    for key in ("budget_bits", "iterations"):
        if (value := getattr(quantize.low_rank, key)) is not None:
            yield KeyedError((*table, key), f"must be unset: {nothing}", value)


def budget_can_be_allocated(config: Config) -> Iterator[KeyedError]:
    """Ranks are allocated before anything is quantized, from the errors of one rounding of each weight."""
    quantize, low_rank, method = config.quantize, config.quantize.low_rank, config.quantize.method
    loc, budget, iterations = ("quantize", "low_rank", "budget_bits"), low_rank.budget_bits, low_rank.iterations
    if budget is None:
        return
    if quantize.propagates_error:
        rule = "not supported with propagate_error = true: ranks are allocated from errors on the original model's "
        yield KeyedError(loc, f"{rule}activations, before any block is quantized", budget)
    if low_rank.rank:
        rule = "must be 0 with budget_bits, which determines all ranks"
        yield KeyedError(("quantize", "low_rank", "rank"), rule, low_rank.rank)
    if not method.rounds_first:
        rule = f'not supported by method "{method.kind}", which rounds last: ranks are allocated from rounding errors'
        yield KeyedError(loc, rule, budget)
    if (iterations or method.iterations) > 1:
        rule = (
            f"not supported with {iterations or method.iterations} iterations: ranks are allocated from the errors of"
        )
        yield KeyedError(loc, f"{rule} one rounding", budget)


def widths_can_be_allocated(config: Config) -> Iterator[KeyedError]:
    """A choice of formats goes with a budget, and nothing else is allocated."""
    if config.quantize.budget_bits is None:
        yield from _nothing_to_allocate(config.quantize)
    else:
        yield from _formats_to_allocate(config, config.quantize.budget_bits)


def _nothing_to_allocate(quantize: QuantizeConfig) -> Iterator[KeyedError]:
    for key in ("widths", "tie_widths"):
        if value := getattr(quantize, key):
            yield KeyedError(("quantize", key), "must be unset without quantize.budget_bits", value)
    if quantize.widths_text != "calibration":
        rule = "must be unset without quantize.budget_bits, for which widths are measured"
        yield KeyedError(("quantize", "widths_text"), rule, quantize.widths_text)
    if quantize.low_rank.optional:
        rule = "must be false without quantize.budget_bits, which decides between ranks and widths"
        yield KeyedError(("quantize", "low_rank", "optional"), rule, True)


def _formats_to_allocate(config: Config, budget: float) -> Iterator[KeyedError]:
    quantize = config.quantize
    if len(set(quantize.widths)) < 2:
        rule = "requires two or more formats to choose from in quantize.widths"
        yield KeyedError(("quantize", "budget_bits"), rule, budget)
    if quantize.low_rank.budget_bits is not None:
        rule = "must be unset with quantize.budget_bits, which gives linears their rank or none (low_rank.optional)"
        yield KeyedError(("quantize", "low_rank", "budget_bits"), rule, quantize.low_rank.budget_bits)
    method, loc = quantize.method, ("quantize", "low_rank", "optional")
    if quantize.low_rank.optional and not (
        method.rounds_first and (quantize.low_rank.iterations or method.iterations) == 1
    ):
        rule = f'must be false with method "{method.kind}", whose A and B are not fitted to the error of one rounding'
        yield KeyedError(loc, rule, True)
    for i, name in enumerate(quantize.widths):
        if config.formats[name].kind == "codebook":
            yield KeyedError(("quantize", "widths", i), "must not be a codebook, whose tables are shared by rows", name)
