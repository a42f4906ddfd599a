"""Attention with quantized operands, through transformers' attention-function registry: no modelling file is copied.

The operands of both products, S = Q·Kᵀ and O = P·V, are rounded. The blocks of their number format run
    "reduction"  along the dimension that the product sums over: head_dim for Q and K, keys for P and V
    "lqer"       along the last dimension of each operand as LQER's code presents it: head_dim for Q, keys for Kᵀ,
                 keys for P, head_dim for V
Blocks along keys share a scale between neighbouring tokens, so a token's result depends, within rounding, on later
tokens: see docs/footguns.md. Gradients pass straight through the rounding.

Shapes: B batch, H heads, G key/value heads, T query tokens, K keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lqer.errors import ModelError
from lqer.formats import NumberFormat, format_from_dict
from lqer.store.files import content_hash
from lqer.transforms.block_function import straight_through


@dataclass(frozen=True)
class QuantizedAttention:
    """The number format of the four operands and the dimension its blocks run along."""

    operand: NumberFormat
    axis: Literal["reduction", "lqer"]

    def __call__(
        self,
        module: nn.Module,
        query_BHTD: Tensor,
        key_BGKD: Tensor,
        value_BGKD: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The contract of transformers' attention functions: returns the output (B, T, H, D) and the weights."""
        if kwargs.get("position_bias") is not None:
            raise ModelError(f"{type(module).__name__} uses position_bias, which quantized attention does not support")
        if attention_mask is None and query_BHTD.shape[2] > 1:
            raise ModelError(f"{type(module).__name__} calls attention without a mask, so it would not be causal")
        repeats = query_BHTD.shape[1] // key_BGKD.shape[1]
        key_BHKD = key_BGKD.repeat_interleave(repeats, dim=1)
        value_BHKD = value_BGKD.repeat_interleave(repeats, dim=1)
        key_axis, value_axis = (-1, -2) if self.axis == "reduction" else (-2, -1)

        def round_(x: Tensor, axis: int = -1) -> Tensor:
            return straight_through(x, partial(self.operand.fake_quantize, axis=axis))

        scores_BHTK = round_(query_BHTD) @ round_(key_BHKD, key_axis).transpose(-1, -2)
        scores_BHTK = scores_BHTK * (query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores_BHTK = torch.tanh(scores_BHTK / softcap) * softcap
        if attention_mask is not None:
            scores_BHTK = scores_BHTK + attention_mask[..., : key_BHKD.shape[-2]]
        sinks_H: Tensor | None = kwargs.get("s_aux")
        if sinks_H is not None:
            # A score of every head for no key at all.
            sinks_BHT1 = sinks_H.to(scores_BHTK.dtype).view(1, -1, 1, 1).expand(*scores_BHTK.shape[:3], 1)
            scores_BHTK = torch.cat([scores_BHTK, sinks_BHT1], dim=-1)
        weights_BHTK = torch.softmax(scores_BHTK, dim=-1, dtype=torch.float32).to(query_BHTD.dtype)
        weights_BHTK = weights_BHTK[..., : key_BHKD.shape[-2]]
        output_BHTD = round_(weights_BHTK) @ round_(value_BHKD, value_axis)
        return output_BHTD.transpose(1, 2).contiguous(), weights_BHTK


def quantized_attention(described: Mapping[str, Any]) -> QuantizedAttention:
    """The attention of a description in a checkpoint: the operands' "format", and "axis"."""
    return QuantizedAttention(format_from_dict(described["format"]), described["axis"])


def quantize_attention(model: PreTrainedModel, attention: QuantizedAttention) -> None:
    """Let every attention module of `model` call `attention`, in place; of a wrapper, those of its language model.

    Raises ModelError if the model does not use the registry.
    """
    language = model if model.config.get_text_config() is model.config else model.get_decoder()
    name = f"lqer_{content_hash([attention.operand.to_dict(), attention.axis])[:12]}"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)
    try:
        language.set_attn_implementation(name)
    except ValueError as error:
        raise ModelError(f"{type(model).__name__}: quantize.attention cannot be applied: {error}") from None
    if language.config._attn_implementation != name:
        raise ModelError(f"{type(model).__name__} has its own attention code: quantize.attention cannot be applied")


@contextmanager
def attention_as(block: nn.Module, implementation: str) -> Iterator[None]:
    """Within the context, the block runs with the attention of that name in transformers' registry."""
    found = (getattr(module, "config", None) for module in block.modules())
    configs = {id(config): config for config in found if isinstance(config, PretrainedConfig)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = implementation
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
