"""From the configuration to the plan of each linear: names resolved to number formats, overrides applied."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lqer.components import did_you_mean
from lqer.config.quantize import NOT_QUANTIZED
from lqer.config.schema import Config
from lqer.errors import ConfigError
from lqer.formats import NumberFormat
from lqer.methods import LinearPlan, Plans
from lqer.methods.base import DEFAULT_FACTOR
from lqer.transforms import LinearTransform

if TYPE_CHECKING:
    # A configuration is read, and its mistakes are reported, without waiting for transformers.
    from lqer.models.summary import ModelSummary


def plan_linear(config: Config, name: str) -> LinearPlan | None:
    """The plan of the linear with the full name `name`, or None where it is skipped."""
    quantize = config.quantize
    if any(fnmatchcase(name, pattern) for pattern in quantize.skip):
        return None

    def number_format(format_name: str) -> NumberFormat | None:
        return None if format_name == NOT_QUANTIZED else config.formats[format_name]

    override = next((o for o in quantize.override if fnmatchcase(name, o.match)), None)
    merged = quantize
    if override is not None:
        merged = quantize.model_copy(update=_given(override, "weight", "rounding", "activation", "bias", "asymmetric"))
    low_rank = quantize.low_rank_under(override)
    return LinearPlan(
        method=quantize.method,
        weight=config.formats[merged.weight],
        rounding=merged.chosen_rounding,
        transform=next((part for part in quantize.transforms if isinstance(part, LinearTransform)), None),
        activation=number_format(merged.activation),
        bias=number_format(merged.bias),
        # Under a budget, None until the model's errors are known.
        rank=low_rank.rank if low_rank.budget_bits is None else None,
        factor=number_format(low_rank.format) or DEFAULT_FACTOR,
        factor_b=None if low_rank.format_b is None else number_format(low_rank.format_b) or DEFAULT_FACTOR,
        factor_axis=low_rank.axis,
        solver=low_rank.solver,
        iterations=low_rank.iterations or quantize.method.iterations,
        seed=config.seed,
        asymmetric=merged.asymmetric,
    )


def _given(section: Any, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(section, name)) is not None}


def plan_widths(config: Config, plans: Plans) -> dict[str, tuple[NumberFormat, ...]]:
    """The formats of quantize.widths for every linear that is quantized and has no weight format of its own."""
    quantize = config.quantize
    if quantize.budget_bits is None:
        return {}
    formats = tuple(config.formats[name] for name in quantize.widths)
    own = [override for override in quantize.override if override.weight is not None]

    def is_fixed(name: str) -> bool:
        first = next((override for override in quantize.override if fnmatchcase(name, override.match)), None)
        return any(first is override for override in own)

    return {name: formats for name, plan in plans.items() if plan is not None and not is_fixed(name)}


def plan_model(config: Config, summary: ModelSummary) -> dict[str, LinearPlan | None]:
    """Every linear's plan, None where it is skipped.

    Raises ConfigError for what does not suit the model: a pattern that matches no linear, a weight of a shape that its
    number format has no codes for, attention that cannot be rounded.
    """
    _check_patterns(config, summary)
    plans = {name: plan_linear(config, name) for name in summary.linears}
    if not any(plans.values()):
        raise ConfigError("quantize.skip: all linears are skipped; there is nothing to quantize")
    _check_shapes(config, summary, plans)
    if config.quantize.attention != NOT_QUANTIZED and not summary.attention_is_registered:
        rule = f"must be 'none' for {summary.architecture}, which does not use transformers' attention interface"
        raise ConfigError(f"quantize.attention: {rule}; found {config.quantize.attention!r}")
    return plans


def _check_patterns(config: Config, summary: ModelSummary) -> None:
    """Raise ConfigError for a pattern that matches no linear: a misspelt one would be ignored silently."""
    # Linears outside the blocks may be named in skip, although they are never quantized; an override of them would
    # have no effect. Presets skip lm_head, which not every model has as an nn.Linear.
    skippable = [*summary.linears, *summary.outside, "lm_head"]
    checks = [(f"quantize.skip.{i}", pattern, skippable) for i, pattern in enumerate(config.quantize.skip)]
    checks += [
        (f"quantize.override.{i}.match", override.match, [*summary.linears])
        for i, override in enumerate(config.quantize.override)
    ]
    for key, pattern, names in checks:
        if not any(fnmatchcase(name, pattern) for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            hint = did_you_mean(pattern.rpartition(".")[2], ends)
            raise ConfigError(
                f"{key}: {pattern!r} matches no linear of {summary.architecture}; "
                f"their names end in {', '.join(ends)}{hint}"
            )


def _check_shapes(config: Config, summary: ModelSummary, plans: Plans) -> None:
    """Raise ConfigError for a weight of a shape that a format it may get has no codes for."""
    widths = plan_widths(config, plans)
    for name, plan in plans.items():
        used = () if plan is None else widths.get(name, (plan.weight,))
        reason = next((why for one in used if (why := one.unsupported_shape(*summary.linears[name]))), None)
        if reason is not None:
            raise ConfigError(
                f"quantize.weight: {name} does not fit its number format: {reason}; add it to quantize.skip"
            )
