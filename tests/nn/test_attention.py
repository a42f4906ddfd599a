"""Attention with quantized operands against transformers' eager attention and against its definition.

Shapes: B batch, H heads, G key/value heads, T query tokens, K keys, D head_dim.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from mixtures import random_mixture
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from lqer.errors import ModelError
from lqer.formats import MXInt, Passthrough
from lqer.nn.attention import QuantizedAttention, quantize_attention

EXACT = QuantizedAttention(Passthrough("float32"), "reduction")
both_axes = pytest.mark.parametrize("axis", ["reduction", "lqer"])


def quantized_copy(model: PreTrainedModel, attention: QuantizedAttention) -> PreTrainedModel:
    model = copy.deepcopy(model)
    quantize_attention(model, attention)
    return model


def eager_copy(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def padded(windows_WT: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """The windows behind `pads` padding tokens, and the attention mask that says so."""
    ids_BT = torch.nn.functional.pad(windows_WT, (pads, 0), value=2)
    return ids_BT, torch.nn.functional.pad(torch.ones_like(windows_WT), (pads, 0))


def test_gradients_pass_straight_through_the_rounding(random_model, windows_WT):
    """With operands in 8 bits they are nearly those of attention that rounds nothing."""
    gradients = []
    for model in (random_model("llama"), quantized_copy(random_model("llama"), QuantizedAttention(MXInt(8), "lqer"))):
        model(windows_WT).logits.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.linalg.vector_norm(gradients[0] - gradients[1]) < 0.05 * torch.linalg.vector_norm(gradients[0])


@torch.no_grad()
def test_without_rounding_it_is_eager_attention(architecture, random_model, windows_WT):
    model = random_model(architecture)
    exact = quantized_copy(model, EXACT)
    assert exact.config._attn_implementation.startswith("lqer_")
    torch.testing.assert_close(exact(windows_WT).logits, eager_copy(model)(windows_WT).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_is_masked(architecture, random_model, windows_WT):
    model = random_model(architecture)
    ids_BT, mask_BT = padded(windows_WT, 5)
    # Rows of different lengths: the first has no padding at all.
    ids_BT[0], mask_BT[0] = torch.arange(3, 20), 1
    logits = quantized_copy(model, EXACT)(ids_BT, attention_mask=mask_BT).logits
    expected = eager_copy(model)(ids_BT, attention_mask=mask_BT).logits
    torch.testing.assert_close(logits[:, 5:], expected[:, 5:], rtol=1e-5, atol=1e-5)


@both_axes
@torch.no_grad()
def test_padding_of_whole_blocks_changes_nothing(random_model, windows_WT, axis):
    model = quantized_copy(random_model("llama"), QuantizedAttention(MXInt(bits=4), axis))
    ids_BT, mask_BT = padded(windows_WT, 16)
    position_ids = (mask_BT.cumsum(1) - 1).clamp(min=0)
    logits = model(ids_BT, attention_mask=mask_BT, position_ids=position_ids).logits
    torch.testing.assert_close(logits[:, 16:], model(windows_WT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
@both_axes
def test_operands_are_rounded_along_the_stated_dimensions(round_mxint, axis, softcap):
    generator = torch.Generator().manual_seed(0)
    query_BHTD = torch.randn(2, 4, 20, 24, generator=generator)
    key_BGKD, value_BGKD = (torch.randn(2, 2, 20, 24, generator=generator) for _ in range(2))
    mask_TK = torch.full((20, 20), torch.finfo(torch.float32).min).triu(1)
    attention = QuantizedAttention(MXInt(bits=8), axis)
    output_BTHD, weights_BHTK = attention(
        torch.nn.Module(), query_BHTD, key_BGKD, value_BGKD, mask_TK, scaling=0.3, softcap=softcap
    )

    key_axis, value_axis = {"reduction": (3, 2), "lqer": (2, 3)}[axis]
    for batch in range(2):
        for head in range(4):
            q, k, v = query_BHTD[batch, head], key_BGKD[batch, head // 2], value_BGKD[batch, head // 2]
            scores = 0.3 * round_mxint(q, 8, 1) @ round_mxint(k, 8, key_axis - 2).T
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            weights = torch.softmax(scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf), dim=-1)
            torch.testing.assert_close(weights_BHTK[batch, head].double(), weights, rtol=1e-5, atol=1e-7)
            expected = round_mxint(weights.float(), 8, 1) @ round_mxint(v, 8, value_axis - 2)
            torch.testing.assert_close(output_BTHD[batch, :, head].double(), expected, rtol=1e-5, atol=1e-6)


def test_scores_are_scaled_by_the_head_width_unless_the_model_says_otherwise():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 3, 16) for _ in range(3))
    mask_TK = torch.zeros(3, 3)
    default = EXACT(torch.nn.Module(), q, k, v, mask_TK)[0]
    assert torch.equal(default, EXACT(torch.nn.Module(), q, k, v, mask_TK, scaling=0.25)[0])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(default, expected)


@torch.no_grad()
def test_generating_with_a_cache_gives_the_tokens_of_generating_without(architecture, random_model, windows_WT):
    model = quantized_copy(random_model(architecture), EXACT)
    ids_BT, mask_BT = padded(windows_WT[:2], 3)
    arguments = {"attention_mask": mask_BT, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids_BT, use_cache=True, **arguments)
    assert cached.shape == (2, 15 + 8)
    assert torch.equal(cached, model.generate(ids_BT, use_cache=False, **arguments))


@torch.no_grad()
def test_two_formats_may_live_in_one_process(random_model, windows_WT):
    model = random_model("llama")
    logits = {}
    models = {bits: quantized_copy(model, QuantizedAttention(MXInt(bits=bits), "reduction")) for bits in (3, 8)}
    for bits, quantized in models.items():
        logits[bits] = quantized(windows_WT).logits
    assert not torch.allclose(logits[3], logits[8], atol=1e-3)
    assert torch.equal(models[3](windows_WT).logits, logits[3])
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_attention_of_its_own_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=80, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"BloomForCausalLM has its own attention code: quantize\.attention cannot"):
        quantize_attention(model, EXACT)


@torch.no_grad()
def test_attention_sinks_take_their_share_and_are_not_rounded(windows_WT):
    model = random_mixture("gpt_oss")
    assert all(layer.self_attn.sinks.abs().max() > 0.05 for layer in model.model.layers)
    exact = quantized_copy(model, EXACT)
    torch.testing.assert_close(exact(windows_WT).logits, eager_copy(model)(windows_WT).logits, rtol=1e-4, atol=1e-5)


def test_a_position_bias_is_refused():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ModelError, match="SimpleNamespace uses position_bias, which quantized attention"):
        EXACT(SimpleNamespace(), x, x, x, None, position_bias=torch.zeros(1))


def test_attention_without_a_mask_would_look_ahead_and_is_refused():
    x = torch.ones(1, 1, 2, 4)
    with pytest.raises(ModelError, match="SimpleNamespace calls attention without a mask"):
        EXACT(SimpleNamespace(), x, x, x, None)
    last_token = x[:, :, -1:]
    assert EXACT(SimpleNamespace(), last_token, x, x, None)[0].shape == (1, 1, 1, 4)
