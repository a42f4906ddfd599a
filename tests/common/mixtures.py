"""Tiny random mixtures of experts, one of every way in which transformers holds and routes them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large enough that logits differ visibly between tokens.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_experts_per_tok": 2,
}
SMALL = {"moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **SMALL}
LATENT = {
    **GROUPS,
    "num_key_value_heads": 4,
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 16),
}
# gpt_oss: transposed, interleaved, with biases and sinks. deepseek, glm: a first layer without experts, then shared
# ones, as in qwen2. gemma4: beside an MLP, and routed by other inputs than theirs. llama4: outside of transformers'
# registry, transposed, the router's weights on the inputs. longcat: outside, too, and two of its six choices pass their
# tokens on. hy_v4: two streams between blocks, the second of which attends to tokens that the first has chosen.
# deepseek_v4: two streams, too, tokens whose experts a table names, and a projection of two groups of heads.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24, **SMALL},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, **SMALL},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 6},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "glm4_moe": {**GROUPS, "head_dim": 16},
    "minimax_m2": {"num_local_experts": 4, "head_dim": 16},
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "hidden_size_per_layer_input": 0,
        "head_dim": 16, "global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], **SMALL,
    },
    "deepseek_v4": {
        "hc_mult": 2, "o_groups": 2, "o_lora_rank": 16, "n_routed_experts": 4, "q_lora_rank": 16, "head_dim": 16,
        "intermediate_size": 160, "num_hidden_layers": 3, "num_key_value_heads": 1, "sliding_window": 6,
        "index_n_heads": 8, "index_head_dim": 16, "index_topk": 64,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "compressed_sparse", "heavily_compressed")],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "hy_v4": {
        **LATENT, "head_dim": 16, "hc_mult": 2, "n_shared_experts": 1, "index_n_heads": 8, "index_head_dim": 16,
        "index_topk": 6, "num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"],
    },
    "llama4_text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "longcat_flash": {
        **LATENT, "head_dim": 16, "num_hidden_layers": 4, "num_layers": 2, "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 48, "moe_topk": 2, "zero_expert_num": 2,
    },
}  # fmt: skip


def random_mixture(kind: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model as transformers builds it, which runs its experts by its own code."""
    config = AutoConfig.for_model(kind, **{**SIZES, **MIXTURES[kind], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start as ones and zeros, which nobody would miss.
            if parameter.ndim == 1 or parameter.shape[-1] == 0:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()
