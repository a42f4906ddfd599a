"""What several test files build for themselves."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    """Two blocks with grouped queries over the ids of `byte_tokenizer`, random but for the seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **settings,
    )
    return LlamaForCausalLM(config).eval()
