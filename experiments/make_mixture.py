"""A mixture of experts that computes what a dense model computes, and gives each expert tokens of its own.

    python experiments/make_mixture.py MODEL FOLDER [--experts 8] [--active 2] [--seed 0]

MODEL is a Llama without biases. Every MLP becomes experts that are copies of it; a random router sends a token to the
ACTIVE of them that score highest, with weights that sum to one. The saved model is a Mixtral with the same tokenizer:
what quantization does to its experts is seen beside what it does to the dense model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lqer.models.source import load_model, load_tokenizer, resolve_model

# Of a configuration of Llama: what Mixtral's has too, with the same meaning.
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id",
    "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip


@torch.no_grad()
def mixture_of(dense: PreTrainedModel, experts: int, active: int, seed: int) -> MixtralForCausalLM:
    """The mixture, in the dense model's dtype. Raises ValueError for a model that is built otherwise."""
    config = dense.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"{type(dense).__name__} is no Llama without biases")
    settings: dict[str, Any] = {key: getattr(config, key) for key in SHARED}
    settings |= {"num_local_experts": experts, "num_experts_per_tok": active, "sliding_window": None}
    mixture = MixtralForCausalLM(MixtralConfig(**settings))
    nn.Module.to(mixture, dense.dtype)
    generator = torch.Generator().manual_seed(seed)
    missing, _ = mixture.load_state_dict(dense.state_dict(), strict=False)
    for layer, original in zip(mixture.model.layers, dense.model.layers, strict=True):
        gate_up = torch.cat([original.mlp.gate_proj.weight, original.mlp.up_proj.weight])
        layer.mlp.experts.gate_up_proj.copy_(gate_up.expand(experts, -1, -1))
        layer.mlp.experts.down_proj.copy_(original.mlp.down_proj.weight.expand(experts, -1, -1))
        layer.mlp.gate.weight.copy_(torch.randn(layer.mlp.gate.weight.shape, generator=generator))
    assert all(".mlp." in name for name in missing), "the rest of the model is Llama's"
    return mixture.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = resolve_model(given.model)
    dense = load_model(source, "auto", torch.device("cpu"))
    mixture_of(dense, given.experts, given.active, given.seed).save_pretrained(given.folder)
    load_tokenizer(source).save_pretrained(given.folder)


if __name__ == "__main__":
    main()
