"""A model's summary, made without its weights: its linears and sizes, to check a configuration before any work."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from lqer.errors import ModelError
from lqer.models.source import ModelSource, load_model_config
from lqer.models.structure import block_linears, find_blocks, prepare_model


@dataclass(frozen=True)
class ModelSummary:
    """Names and sizes of the linears and of everything else, in the order of the model.

    linears: (out_features, in_features) by full name.
    """

    architecture: str
    parameters: int
    blocks_name: str
    blocks: int
    linears: dict[str, tuple[int, int]]
    # Linears outside the decoder blocks (the head, projections around the embedding): never quantized.
    outside: tuple[str, ...]
    # Whether attention goes through transformers' registry, where its operands can be quantized.
    attention_is_registered: bool
    # Parameters of the largest block and of everything outside the blocks; size of a hidden state; vocabulary size.
    block_parameters: int
    outside_parameters: int
    hidden_size: int
    vocabulary: int


def summarize_model(source: ModelSource) -> ModelSummary:
    """Build the model without weights and summarize it. Raises ModelError for a model that cannot be quantized."""
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(load_model_config(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model: {source.name} is not a causal language model: {str(error).splitlines()[0]}") from None
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
    return ModelSummary(
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
