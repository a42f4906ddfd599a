"""A decoder block of Llama's kind with random weights, for benchmarks of what works on one block."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lqer.transforms.block_function import BlockFunction


def random_block(hidden: int, intermediate: int, heads: int, seq_len: int, device: torch.device) -> BlockFunction:
    """The block as a function of hidden states (B, seq_len, hidden), float32, drawn from torch's seed on a device."""
    with device:
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=1,
            num_attention_heads=heads,
        )
        model = LlamaForCausalLM(config).eval()
        positions_1T = torch.arange(seq_len).unsqueeze(0)
    block = model.model.layers[0]
    rotary = model.model.rotary_emb(block.mlp.up_proj.weight, positions_1T)
    return BlockFunction(block, kwargs={"position_embeddings": rotary})
