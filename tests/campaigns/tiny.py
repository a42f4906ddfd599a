"""Tiny random models of any causal architecture of the installed transformers, with a tokenizer of bytes.

    python tests/campaigns/tiny.py KIND FOLDER        KIND is a model_type, as "gpt2"

Exit status 0: saved; 3: it cannot be built small, and one line says why.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCABULARY = 257
POSITIONS = 256
MOST_PARAMETERS = 20e6
CANNOT_BE_BUILT = 3
# One size under every name that some configuration has for it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "hidden_dim"], 64),
    **dict.fromkeys(["emb_dim", "out_hidden_size"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"], 96),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "context_length"], POSITIONS),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"], 0),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 16),
    **dict.fromkeys(["head_dim", "rotary_dim", "query_pre_attn_scalar", "sliding_window"], 16),
    **dict.fromkeys(["chunk_size", "index_head_dim"], 16),
    **dict.fromkeys(["n_mamba_heads", "mamba_n_heads", "mamba_d_conv", "index_n_heads"], 4),
    **dict.fromkeys(["hidden_size_per_layer_input", "laurel_rank", "mamba_d_state", "index_topk"], 8),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok"], 2),
    **dict.fromkeys(["encoder_attention_heads", "mamba_expand"], 2),
    # As many as in the decoder: transformers makes the cache of BART and its kin for as many layers as the encoder has.
    "encoder_layers": 4,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace"], 1),
    # Large enough that logits differ visibly between tokens.
    **dict.fromkeys(["initializer_range", "init_std"], 0.1),
}  # fmt: skip


def _sections(*sizes: int, **more: float) -> dict[str, Any]:
    """Sections of rotary positions of wrappers, which are half of what is rotated."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes), **more}


_SECTIONS = {"rope_parameters": _sections(2, 3, 3)}
# Blocks of both kinds, the last two of which read the keys and values of the first two.
_SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
# Beside an MLP: by default there are none.
_EXPERTS = {"enable_moe_block": True, "top_k_experts": 2}
# Ids that the code of some wrappers reads and their configurations do not have by default.
_STARTS = {"vision_start_token_id": 1, "audio_start_token_id": 2}
_ATTENTIONS = ["sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse"]
# What else an architecture needs to be small, or to be in proportion: little that is not a linear. By model_type.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"num_hidden_layers": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v4": {"hc_mult": 2, "o_groups": 2, "o_lora_rank": 32, "n_routed_experts": 8, "moe_intermediate_size": 96,
                    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
                    "layer_types": [f"{kind}_attention" for kind in _ATTENTIONS],
                    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], "moe_num_experts": 4, "moe_k": 2,
                             "rope_parameters": _sections(3, 3, 2)},
    "falcon_mamba": {"state_size": 4},
    "glm4v_moe_text": {"rope_parameters": _sections(1, 1, 2, partial_rotary_factor=0.5)},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0, "hc_mult": 2, "linear_head_dim": 32,
                       "linear_num_heads": 4},
    **dict.fromkeys(["glm4v_text", "glm_ocr_text", "glmga_text", "qwen2_5_omni_text"], _SECTIONS),
    **dict.fromkeys(["qwen2_5_vl_text", "qwen2_vl_text", "paddleocr_vl_text"], _SECTIONS),
    "gemma3n_text": _SHARED,
    "gemma4_text": _SHARED | _EXPERTS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "hy_v4": {"hc_mult": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 16,
                    "linear_num_heads": 4},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2},
    "mamba": {"state_size": 4},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "muse_spark": {"projector_hidden_size": 64},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 32, 32]},
    "muse_spark_text": {"moe_hidden_size": 32},
    "phi4_multimodal": {"intermediate_size": 1024},
    "recurrent_gemma": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 192},
    **dict.fromkeys(["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"], _STARTS),
    "qwen2_vl_vision": {"embed_dim": 64, "depth": 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_embds_dim": [16, 48],
                 "axial_pos_shape": [16, 16]},
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64, "num_hidden_layers": 8},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 64, "num_hidden_layers": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2, "mamba_headdim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


class CannotBeBuiltError(Exception):
    """Why there is no tiny model of this kind."""


def causal_kinds() -> list[str]:
    """The model_type of every architecture that the installed transformers loads as a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def wrapper_kinds() -> list[str]:
    """The model_type of every architecture that it loads as a language model with other inputs, too."""
    return sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, from 1 on; id 0 starts and ends a text."""
    vocabulary = {token: index for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def tiny_config(kind: str, **settings: Any) -> PreTrainedConfig:
    """The configuration of a model_type with SIZES, those of its towers and of its language model too."""
    return _tiny(AutoConfig.for_model(kind), settings)


def _tiny(config: PreTrainedConfig, settings: Mapping[str, Any]) -> PreTrainedConfig:
    known = inspect.signature(type(config).__init__).parameters
    sizes = {key: SIZES[key] for key in SIZES if key in known} | OWN_SIZES.get(config.model_type, {})
    if "kv_lora_rank" in known:
        # Latent attention has as many heads of keys as of queries.
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    sizes |= {name: _tiny(part, {}) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    return type(config)(**(sizes | settings))


def build(folder: Path, kind: str = "llama", seed: int = 0, wrapper: bool = False, **settings: Any) -> None:
    """Save a random float32 model and its tokenizer. Raises CannotBeBuiltError with the reason.

    wrapper: the model with its towers for images or sound, where transformers knows the language model alone, too.
    """
    try:
        config, auto = tiny_config(kind, **settings), AutoModelForMultimodalLM if wrapper else AutoModelForCausalLM
        with torch.device("meta"):
            parameters = sum(p.numel() for p in auto.from_config(config).parameters())
        if parameters > MOST_PARAMETERS:
            raise CannotBeBuiltError(f"{parameters / 1e6:.0f} M parameters")
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases start as ones and zeros, which nobody would miss.
                if parameter.ndim == 1 and parameter.is_floating_point():
                    parameter += 0.05 * torch.randn_like(parameter)
            model(input_ids=torch.arange(1, 65).view(2, 32), use_cache=False)
        model.save_pretrained(folder)
        if type(AutoConfig.from_pretrained(folder)) not in auto._model_mapping:
            raise CannotBeBuiltError("transformers does not load what it saves of it")
    except CannotBeBuiltError:
        raise
    except Exception as error:  # each architecture has ways of its own to dislike its sizes
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise CannotBeBuiltError(f"{type(error).__name__}: {reason}") from error
    byte_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    try:
        build(Path(sys.argv[2]), sys.argv[1])
    except CannotBeBuiltError as reason:
        print(reason)
        sys.exit(CANNOT_BE_BUILT)
