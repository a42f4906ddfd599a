"""A mixture of copies of a dense model's MLPs computes the dense model's function."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny_llama
from make_mixture import mixture_of

from lqer.models.structure import prepare_model
from lqer.nn.experts import experts_of, routes


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_copies_under_a_random_router_compute_what_the_dense_model_computes(windows_WT, tied):
    dense = tiny_llama(tie_word_embeddings=tied)
    mixture = mixture_of(dense, experts=8, active=2, seed=0)
    torch.testing.assert_close(mixture(windows_WT).logits, dense(windows_WT).logits, rtol=1e-4, atol=1e-5)
    split = copy.deepcopy(mixture)
    prepare_model(split)
    torch.testing.assert_close(split(windows_WT).logits, dense(windows_WT).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_expert_has_tokens_of_its_own(windows_WT):
    mixture = mixture_of(tiny_llama(), experts=4, active=1, seed=0)
    prepare_model(mixture)
    sent = []
    for layer in mixture.model.layers:
        (experts,) = experts_of(layer).values()
        experts.register_forward_pre_hook(lambda _, args: sent.append([*routes(args[1], 4)]))
    mixture(windows_WT)
    for layer in sent:
        tokens = [set(tokens.tolist()) for _, tokens, _ in layer]
        assert len(tokens) >= 3
        assert sum(map(len, tokens)) == len(set.union(*tokens)) == windows_WT.numel()


def test_another_model_is_refused(random_model):
    with pytest.raises(ValueError, match="GPT2LMHeadModel is no Llama"):
        mixture_of(random_model("gpt2"), 4, 2, 0)
