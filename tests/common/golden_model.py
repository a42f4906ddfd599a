"""A random Llama whose weights are small integers over a power of two: the same bytes on every machine."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save_integer_llama(folder: Path) -> None:
    """Two blocks with grouped queries, in float32, with one input channel ten times as large as the others."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randint(48, 80, parameter.shape, generator=generator) / 64)
                parameter[3] *= 10
            else:
                # A sum of four is bell-shaped enough for outliers to matter.
                values = torch.randint(-127, 128, (4, *parameter.shape), generator=generator)
                parameter.copy_(values.sum(0) / 1024)
    model.save_pretrained(folder)
