"""A model's outline, read without its weights: which linears there are, to check a configuration against at once."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from lqer.config import Config, plan_linear
from lqer.config.schema import NOT_QUANTIZED
from lqer.errors import ConfigError, ModelError
from lqer.methods import LinearPlan
from lqer.models import ModelSource, block_linears, find_blocks, load_model_config, prepare_model
from lqer.spelling import did_you_mean


@dataclass(frozen=True)
class Outline:
    """Names and sizes of what is quantized, by full name, in the order of the model."""

    architecture: str
    parameters: int
    blocks_name: str
    blocks: int
    linears: dict[str, tuple[int, int]]
    # Linears outside the decoder blocks (the head, projections around the embedding): never quantized.
    outside: tuple[str, ...]
    # Whether attention goes through transformers' registry, where its operands can be quantized.
    attention_is_registered: bool
    # Parameters of the largest block, and of what surrounds the blocks; features between blocks, tokens of the head.
    block_parameters: int
    outside_parameters: int
    hidden_size: int
    vocabulary: int


def read_outline(source: ModelSource) -> Outline:
    """Build the model without weights and look at it. Raises ModelError for what cannot be quantized."""
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(load_model_config(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model: {source.name} is no causal language model: {str(error).splitlines()[0]}") from None
    model.tie_weights()
    prepare_model(model)
    blocks_name, blocks = find_blocks(model)
    linears = {
        f"{blocks_name}.{index}.{name}": (linear.out_features, linear.in_features)
        for index, block in enumerate(blocks)
        for name, linear in block_linears(block).items()
    }
    outside = tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linears
    )
    parameters = _count(model)
    text_config = model.config.get_text_config()
    return Outline(
        architecture=type(model).__name__,
        parameters=parameters,
        blocks_name=blocks_name,
        blocks=len(blocks),
        linears=linears,
        outside=outside,
        attention_is_registered=type(model)._can_set_attn_implementation(),
        block_parameters=max(map(_count, blocks)),
        outside_parameters=parameters - _count(blocks),
        hidden_size=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def plan_model(config: Config, outline: Outline) -> dict[str, LinearPlan | None]:
    """Every linear's plan, None where it is skipped.

    Raises ConfigError for a pattern that matches no linear: a misspelt one would otherwise change nothing, in silence.
    """
    # What lies outside the blocks may be skipped, as it is anyway; an override of it would change nothing. Not every
    # model has an nn.Linear called lm_head, and presets skip it for all of them.
    skippable = [*outline.linears, *outline.outside, "lm_head"]
    checks = [(f"quantize.skip.{i}", pattern, skippable) for i, pattern in enumerate(config.quantize.skip)]
    checks += [
        (f"quantize.override.{i}.match", override.match, [*outline.linears])
        for i, override in enumerate(config.quantize.override)
    ]
    for key, pattern, names in checks:
        if not any(fnmatchcase(name, pattern) for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"{key}: {pattern!r} matches no linear of {outline.architecture} that could be quantized or skipped; "
                f"those are named {', '.join(ends)}{did_you_mean(pattern.rpartition('.')[2], ends)}"
            )
    plans = {name: plan_linear(config, name) for name in outline.linears}
    if config.quantize.attention != NOT_QUANTIZED and not outline.attention_is_registered:
        raise ConfigError(
            f"quantize.attention: must be 'none' for {outline.architecture}, which computes attention by itself; "
            f"found {config.quantize.attention!r}"
        )
    if not any(plans.values()):
        raise ConfigError("quantize.skip: every linear is skipped, nothing is left to quantize")
    return plans
