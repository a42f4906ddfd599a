"""What several test files build for themselves."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lqer.config import read_config
from lqer.errors import ConfigError
from lqer.methods import LinearPlan
from lqer.models.loaders import OpenedModel
from lqer.models.structure import block_linears, find_blocks
from lqer.models.walker import walk_blocks
from lqer.stages.gather import CalibrationText, StatisticsOf
from lqer.stages.quantize import finish_checkpoint, quantize_blocks
from lqer.stages.quantize_linears import Order, QuantizeSettings
from lqer.stages.quantize_sequential import quantize_in_order
from lqer.store.offload import Offload
from lqer.store.store import Artifact, Workspace
from lqer.transforms import BlockTransform
from lqer.transforms.block_function import BlockFunction

BOS = 0


def byte_tokenizer(adds_bos: bool = False, **arguments: Any) -> PreTrainedTokenizerFast:
    """One id per byte, from 1 on; id 0 starts and ends a text, and is added by the tokenizer where `adds_bos`."""
    vocabulary = {token: index for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", **arguments)


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """Two blocks with grouped queries over the ids of `byte_tokenizer`; the same weights for the same settings."""
    defaults = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **settings})).eval()


def build_gemma4(shared: int) -> Gemma4ForCausalLM:
    """Six blocks of embeddings of their own, the last `shared` of which read the keys and values of others."""
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size_per_layer_input": 80}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            **sizes, **heads, hidden_size_per_layer_input=8, num_kv_shared_layers=shared, layer_types=kinds,
            sliding_window=6, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def resident(model: PreTrainedModel, device: str = "cpu") -> OpenedModel:
    """A model in memory as the stages take it."""
    return OpenedModel.resident(model, torch.device(device), Offload())


def walk(model: nn.Module, windows_WT: Tensor, batch_size: int = 2) -> list[Tensor]:
    """The outputs of the last block for every batch."""
    opened = resident(model)
    outputs: list[Tensor] = []
    hook = opened.blocks[-1].register_forward_hook(lambda block, args, output: outputs.append(output))
    for run in walk_blocks(opened, windows_WT, batch_size):
        run.forward()
    hook.remove()
    return outputs


def settings_for(
    model: PreTrainedModel,
    plan: LinearPlan,
    attention: Mapping[str, Any] | None = None,
    skip: Collection[str] = (),
    transforms: Collection[BlockTransform] = (),
    order: Order = "block",
) -> QuantizeSettings:
    """The same plan for every linear, but none for those whose full names end in one of `skip`."""
    name, blocks = find_blocks(model)
    names = [f"{name}.{index}.{linear}" for index, block in enumerate(blocks) for linear in block_linears(block)]
    plans = {linear: None if any(map(linear.endswith, skip)) else plan for linear in names}
    return QuantizeSettings(plans, attention, seed=0, transforms=tuple(transforms), order=order)


def quantize(
    workspace: Workspace,
    opened: OpenedModel,
    tokenizer: PreTrainedTokenizerFast,
    statistics_of: StatisticsOf,
    settings: QuantizeSettings,
) -> None:
    """Make the checkpoint in one process, as the stage "quantize" does."""
    quantize_blocks(workspace, range(len(opened.blocks)), opened, statistics_of, settings)
    finish_checkpoint(workspace, opened, tokenizer, settings)


def quantize_in_memory(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: CalibrationText,
    settings: QuantizeSettings,
    make: Callable[[Path], Workspace] = Workspace,
) -> Workspace:
    """Make the checkpoint in one process with error propagation; the model is left as it is."""
    workspace = make(folder)
    quantize_in_order(workspace, resident(model), resident(copy.deepcopy(model)), text, settings)
    finish_checkpoint(workspace, resident(model), tokenizer, settings)
    return workspace


@torch.no_grad()
def inputs_of_linears(model: PreTrainedModel, windows_WT: Tensor, batch_size: int) -> dict[str, list[Tensor]]:
    """Every batch's inputs, (tokens, in_features), of each linear of the decoder blocks by full name."""
    name, blocks = find_blocks(model)
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, key=f"{name}.{i}.{key}": inputs[key].append(args[0].flatten(0, -2))
        )
        for i, block in enumerate(blocks)
        for key, linear in block_linears(block).items()
    ]
    for ids_BT in windows_WT.split(batch_size):
        model(ids_BT)
    for hook in hooks:
        hook.remove()
    return inputs


def first_block(model: PreTrainedModel, windows_WT: Tensor) -> tuple[nn.Module, BlockFunction, Tensor]:
    """A model's first decoder block, its function, and the hidden states (W, T, D) that reach it."""
    _, blocks = find_blocks(model)
    called: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: called.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model.base_model(input_ids=windows_WT, use_cache=False)
    hook.remove()
    ((hidden_WTD, *args), kwargs) = called[0]
    return blocks[0], BlockFunction(blocks[0], tuple(args), kwargs), hidden_WTD


def all_sites(calibration: Artifact | Workspace) -> dict[str, str]:
    """The input site of every linear of a model, from the files of its blocks."""
    names = sorted(path.name for path in calibration.path.glob("sites-*.json"))
    return {linear: site for name in names for linear, site in calibration.json(name).items()}


def config_mistake(path: Path, *overrides: str) -> str:
    """The one line that answers a mistake in a configuration, or in the settings that override it."""
    with pytest.raises(ConfigError) as caught:
        read_config(path, None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message
