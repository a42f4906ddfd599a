"""Attention of one new token by a kernel of ours, through transformers' attention-function registry.

Everything but one token over a static cache runs as `sdpa` runs it. With a mask over a static cache, that makes three
launches of one token and, for grouped attention, copies of all keys and values.

Shapes: B sequences, H query heads, G key heads, S tokens of the cache, D width of a head, T new tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "lqer_one_token"
# Relative to the norm of the outputs, as in lqer/kernels/first_use.py.
MOST_ERROR = 0.02
# Arguments that change the formula, where a model gives them.
OTHER_FORMULAS = ("position_bias", "softcap", "s_aux")


def one_token_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The contract of transformers' attention functions: returns the output (B, T, H, D), and no weights."""
    from lqer.kernels.decode_attention import decode_attention, fits

    plain = not query_BHTD.requires_grad and all(kwargs.get(name) is None for name in OTHER_FORMULAS)
    if plain and fits(query_BHTD, key_BGSD, value_BGSD, attention_mask):
        scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
        return decode_attention(query_BHTD, key_BGSD, value_BGSD, attention_mask, scale), None
    return sdpa_attention_forward(
        module, query_BHTD, key_BGSD, value_BGSD, attention_mask, scaling=scaling, **kwargs
    )  # fmt: skip


def attend_by_kernel(model: PreTrainedModel) -> None:
    """Let the attention modules of a model on a GPU that run as `sdpa` call `one_token_attention`, in place.

    The kernel is compared with torch before; where they disagree, attention stays as it is, with a warning.
    """
    from lqer.kernels.decode_attention import counters, relative_error

    language = model if model.config.get_text_config() is model.config else model.get_decoder()
    config = language.config
    heads = getattr(config, "num_attention_heads", None)
    if config._attn_implementation != "sdpa" or not isinstance(heads, int):
        return
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    error = relative_error(heads, groups, width, model.dtype, model.device)
    if not error <= MOST_ERROR:
        warnings.warn(f"attention stays sdpa: the kernel of one token differs from torch by {error:.2g}", stacklevel=2)
        return
    counters(model.device)
    ALL_ATTENTION_FUNCTIONS.register(NAME, one_token_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    language.set_attn_implementation(NAME)
