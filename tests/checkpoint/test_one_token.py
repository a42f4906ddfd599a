"""Attention of one token by the kernel, within a model, is that of sdpa."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, DTYPE
from transformers import LlamaConfig, LlamaForCausalLM

from lqer.checkpoint import one_token
from lqer.checkpoint.one_token import NAME, attend_by_kernel

LENGTH, NEW_TOKENS = 7, 6


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE, DTYPE).eval()


def greedy(model: LlamaForCausalLM, cache: str | None):
    ids_BT = torch.arange(2 * LENGTH, device=DEVICE).view(2, LENGTH)
    padded = torch.ones_like(ids_BT)
    padded[0, :2] = 0
    return model.generate(
        ids_BT, attention_mask=padded, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        cache_implementation=cache, disable_compile=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


@torch.no_grad()
def test_a_static_cache_runs_the_kernel_for_every_token_but_those_of_the_prompt(model, monkeypatch):
    expected = greedy(model, "static")
    attend_by_kernel(model)
    assert model.config._attn_implementation == NAME
    others: list[int] = []
    sdpa = one_token.sdpa_attention_forward

    def counted(module, query_BHTD, *arguments, **named):
        others.append(query_BHTD.shape[2])
        return sdpa(module, query_BHTD, *arguments, **named)

    monkeypatch.setattr(one_token, "sdpa_attention_forward", counted)
    found = greedy(model, "static")
    assert others == [LENGTH] * 2
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()
    assert torch.equal(found.sequences, expected.sequences)


def test_attention_stays_sdpa_with_a_warning_where_the_kernel_is_wrong(model, monkeypatch):
    monkeypatch.setattr("lqer.kernels.decode_attention.relative_error", lambda *_: 0.5)
    with pytest.warns(UserWarning, match="differs from torch by 0.5"):
        attend_by_kernel(model)
    assert model.config._attn_implementation == "sdpa"


def test_another_implementation_is_left_as_it_is(model):
    model.set_attn_implementation("eager")
    attend_by_kernel(model)
    assert model.config._attn_implementation == "eager"
