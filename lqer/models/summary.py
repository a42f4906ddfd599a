"""A model's summary, made without its weights: its linears and sizes, to check a configuration before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from lqer.models.auto import auto_class, without_values
from lqer.models.files import reported_as
from lqer.models.source import ModelSource, load_model_config
from lqer.models.structure import block_linears, find_blocks, prepare_model

# A key of config.json: how many hidden states a token has between two blocks.
STREAMS = "hc_mult"
# OPT's table has two rows that no position uses.
MOST_EXTRA_POSITIONS = 8


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
    # Parameters of the largest block and of everything outside the blocks; values of a token between two blocks, in all
    # streams of hyper-connections; vocabulary size.
    block_parameters: int
    outside_parameters: int
    hidden_size: int
    vocabulary: int
    # Token ids that the embedding has rows for.
    embedded_ids: int
    # The longest sequence that the model is made for, None if its configuration names none; whether positions are rows
    # of a table, so that a longer sequence cannot be run at all.
    max_positions: int | None
    learnt_positions: bool


def summarize_model(source: ModelSource) -> ModelSummary:
    """Build the model without weights and summarize it. Raises ModelError for a model that cannot be quantized."""
    config = load_model_config(source)
    with reported_as(f"model: {source.name} is not a causal language model"), without_values():
        model = auto_class(config).from_config(config)
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
    max_positions = getattr(text_config, "max_position_embeddings", None)
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
        hidden_size=text_config.hidden_size * getattr(text_config, STREAMS, 1),
        vocabulary=text_config.vocab_size,
        embedded_ids=cast(nn.Embedding, model.get_input_embeddings()).num_embeddings,
        max_positions=max_positions,
        learnt_positions=max_positions is not None and _has_position_table(model, max_positions),
    )


def _has_position_table(model: PreTrainedModel, max_positions: int) -> bool:
    """Whether an embedding other than the tokens' has one row per position (a few more in OPT)."""
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    others = (table for table in tables if table is not model.get_input_embeddings())
    return any(0 <= table.num_embeddings - max_positions <= MOST_EXTRA_POSITIONS for table in others)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
