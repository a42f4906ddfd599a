"""Expands a GGUF file of a Llama or Qwen2 model into a transformers checkpoint whose weights lie on no 4-bit grid.

Dequantized as they are, such weights would flatter every 4-bit scheme: in each block of 32 they take 16 values, which
4-bit rounding reproduces. So the model is rescaled, which does not change its function. A fixed random gain per
channel, between 0.84 and 1.19, moves

    norm -> linear            from the norm's gain into the columns of the linears that read it; from the last norm into
                              the head, if the head is not tied to the embedding
    v_proj -> o_proj          from the columns of the second into the rows (and the bias) of the first;
    up_proj -> down_proj      groups of query heads share the channels of v_proj

Nothing else moves: apart from those factors the norms are as they were trained, as in every published checkpoint.
(Whole gains of norms multiplied into the weights would triple what plain rounding loses.)

Only torch, transformers, gguf and safetensors are needed, and no network:

    python -c "from lqer.models.demo_expand import expand; expand('model.gguf', 'folder', 'bfloat16')"

Shapes: O out_features, I in_features, K key/value heads, D head_dim.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn import Linear
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

from lqer.errors import ModelError

GAIN_SEED = 0
# Gains are n/1024 with n drawn from this range: exact in fp32, so every machine computes the same bytes.
GAIN_RANGE = (861, 1220)
MAX_LOGIT_ERROR = 1e-4
PROBE = "Every river finds the sea, although none of them was told where it lies. In 1852, about 40 of them"


def expand(gguf: Path | str, folder: Path | str, dtype: str) -> float:
    """Write config, weights in `dtype` ("float16" or "bfloat16") and tokenizer of a local GGUF file into `folder`.

    Computes in float32; at the peak about 6 bytes of memory per parameter. Returns the relative change of the logits of
    a short text, before weights are stored in `dtype`. Raises ModelError if it is 1e-4 or more.
    """
    gguf, folder = Path(gguf), Path(folder)
    # Loading draws progress bars on stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        rescale_(model, GAIN_SEED)
        error = ((model(ids).logits - before).norm() / before.norm()).item()
    if not error < MAX_LOGIT_ERROR:
        raise ModelError(f"{gguf.name}: rescaling changed the logits by {error:.1e}, more than {MAX_LOGIT_ERROR:.0e}")
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, dtype)
    tokenizer.save_pretrained(folder)
    return error


def rescale_(model: LlamaForCausalLM | Qwen2ForCausalLM, seed: int) -> None:
    """Take every linear of the decoder blocks off its 4-bit grid, in place, without changing the function.

    For a float32 model with RMS norms, gated MLPs and any biases. A head of its own is rescaled too; the last norm of a
    model whose head is tied to the embedding keeps its gain.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            _move_from_norm_(
                block.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj), generator
            )
            _move_from_norm_(block.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj), generator)
            gain_KD = channel_gains(attention.v_proj.out_features, generator).view(-1, attention.head_dim)
            _multiply_rows_(attention.v_proj, gain_KD.flatten())
            # Query heads that share a value head are adjacent in o_proj's input.
            attention.o_proj.weight.div_(gain_KD.repeat_interleave(attention.num_key_value_groups, dim=0).flatten())
            gain_O = channel_gains(mlp.up_proj.out_features, generator)
            _multiply_rows_(mlp.up_proj, gain_O)
            mlp.down_proj.weight.div_(gain_O)
        if not model.config.tie_word_embeddings:
            _move_from_norm_(model.model.norm.weight, (model.lm_head,), generator)


def _move_from_norm_(norm_I: Tensor, linears: tuple[Linear, ...], generator: Generator) -> None:
    gain_I = channel_gains(linears[0].in_features, generator)
    norm_I.div_(gain_I)
    for linear in linears:
        linear.weight.mul_(gain_I)


def _multiply_rows_(linear: Linear, gain_O: Tensor) -> None:
    linear.weight.mul_(gain_O[:, None])
    if linear.bias is not None:
        linear.bias.mul_(gain_O)


def channel_gains(count: int, generator: Generator) -> Tensor:
    """Gains of channels, float32 (count,): multiples of 1/1024."""
    return torch.randint(*GAIN_RANGE, (count,), generator=generator) / 1024


def save_model(model: Any, folder: Path, dtype: str) -> None:
    """Write config.json and the weights in that dtype: the same bytes whatever transformers is installed."""
    config = model.config.to_diff_dict()
    # Leave out entries about the GGUF file and this machine's transformers.
    for entry in ("quantization_config", "_model_name_or_path", "transformers_version"):
        config.pop(entry, None)
    config |= {"architectures": [type(model).__name__], "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    left_out = "lm_head.weight" if model.config.tie_word_embeddings else None
    tensors = {
        name: tensor.to(getattr(torch, dtype)).contiguous()
        for name, tensor in model.state_dict().items()
        if name != left_out
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors creates files that only their owner can read; a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
