"""Divergence from the original against direct sums over the whole vocabulary, on tiny models.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import resident, tiny_llama
from transformers import LlamaForCausalLM

from lqer.evaluation import divergence as module
from lqer.evaluation.divergence import (
    Distribution,
    covered_probability,
    distribution,
    divergence,
    divergences,
    original_distributions,
)

VOCABULARY = 257


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def candidate() -> LlamaForCausalLM:
    """The original with noise on every weight."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def batches() -> tuple[torch.Tensor, ...]:
    """Five windows of 12 tokens in batches of two; the last one is smaller."""
    return torch.randint(VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0)).split(2)


def measure(original, candidate, batches, top_k=VOCABULARY):
    found = list(original_distributions(original, batches, top_k, progress=False))
    return divergence(candidate, found, batches, "concat", progress=False)


def direct(original, candidate, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and agreement of each position, from softmaxes of all logits in float64."""
    tokens = torch.cat(batches)
    with torch.no_grad():
        log_p = original(tokens).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
        log_q = candidate(tokens).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
    return (log_p.exp() * (log_p - log_q)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1)


def test_the_whole_vocabulary_gives_the_divergence_itself(original, candidate, batches):
    kl_N, agrees_N = direct(original, candidate, batches)
    result = measure(original, candidate, batches)
    assert result.kl_mean == pytest.approx(kl_N.mean().item(), rel=1e-5)
    assert result.top1_agreement == pytest.approx(agrees_N.double().mean().item())
    assert 0 < result.top1_agreement < 1
    # The smallest value that at least 99 % of all 55 are not above is the largest.
    assert result.kl_p99 == pytest.approx(kl_N.max().item(), rel=1e-5)
    assert result.covered == 1
    assert (result.tokens, result.windows, result.seq_len, result.top_k) == (55, 5, 12, VOCABULARY)


def test_the_percentile_leaves_one_of_a_hundred_above(original, candidate):
    batches = torch.randint(VOCABULARY, (30, 12), generator=torch.Generator().manual_seed(6)).split(8)
    kl_N, _ = direct(original, candidate, batches)
    result = measure(original, candidate, batches)
    assert (kl_N > result.kl_p99 * (1 + 1e-4)).sum() == len(kl_N) // 100


@pytest.mark.parametrize("top_k", [1, 8, 64, VOCABULARY])
def test_the_distance_of_a_model_from_itself_is_exactly_0(original, batches, top_k):
    result = measure(original, original, batches, top_k)
    assert (result.kl_mean, result.kl_p99, result.top1_agreement) == (0, 0, 1)


def test_fewer_tokens_give_a_lower_bound_that_grows_with_them(original, candidate, batches):
    kl_N, _ = direct(original, candidate, batches)
    bounds = [measure(original, candidate, batches, top_k) for top_k in (1, 4, 16, 64, 256, VOCABULARY)]
    means = [bound.kl_mean for bound in bounds]
    assert means == sorted(means)
    assert 0 < means[0] < means[2] < kl_N.mean()
    covered = [bound.covered for bound in bounds]
    assert covered == sorted(covered)


def test_a_bound_is_the_divergence_of_distributions_whose_other_tokens_are_merged():
    generator = torch.Generator().manual_seed(2)
    logits_NV, other_NV = torch.randn(2, 9, 50, generator=generator).double()
    p, q = logits_NV.softmax(-1), other_NV.softmax(-1)
    top = p.topk(5, dim=-1).indices

    def merged(probabilities: torch.Tensor) -> torch.Tensor:
        kept = probabilities.gather(-1, top)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)

    expected = (merged(p) * (merged(p) / merged(q)).log()).sum(-1)
    found = distribution(logits_NV.float(), 5)
    kl_N, _ = divergences(found, other_NV.float())
    torch.testing.assert_close(kl_N, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(covered_probability(found), merged(p)[:, :-1].sum(-1), rtol=1e-5, atol=0)


def test_a_tie_for_the_most_likely_token_agrees():
    original_NV = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    candidate_NV = torch.tensor([[2.0, 2.0, 0.0], [0.0, 2.0, 2.0]])
    _, agrees_N = divergences(distribution(original_NV, 2), candidate_NV)
    assert agrees_N.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_stored_in_their_own_dtype_and_lose_nothing(dtype):
    logits_NV = torch.randn(7, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = distribution(logits_NV, 8)
    assert isinstance(found, Distribution)
    assert (found.ids_NK.dtype, found.logits_NK.dtype, found.total_N.dtype) == (torch.int32, dtype, torch.float32)
    assert torch.equal(found.logits_NK, logits_NV.gather(-1, found.ids_NK.long()))
    kl_N, agrees_N = divergences(found, logits_NV)
    assert kl_N.count_nonzero() == 0
    assert agrees_N.all()


def test_more_tokens_than_the_vocabulary_has_are_all_of_them():
    logits_NV = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
    assert distribution(logits_NV, 100).ids_NK.shape == (3, 6)


def test_the_result_does_not_depend_on_how_many_positions_are_widened_at_once(
    original, candidate, batches, monkeypatch
):
    expected = measure(original, candidate, batches, 8)
    monkeypatch.setattr(module, "LOSS_POSITIONS", 4)
    assert measure(original, candidate, batches, 8) == expected


def test_block_by_block_it_is_the_same(original, candidate, batches):
    expected = measure(original, candidate, batches, 8)
    assert measure(resident(original), resident(candidate), batches, 8) == expected


@pytest.mark.parametrize(("value", "kl"), [(math.nan, math.nan), (-math.inf, math.inf)])
def test_logits_beyond_numbers_are_reported_as_they_are(value, kl):
    logits_NV = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    broken_NV = logits_NV.clone()
    broken_NV[2, logits_NV[2].argmax()] = value
    kl_N, _ = divergences(distribution(logits_NV, 3), broken_NV)
    assert kl_N[2].item() == pytest.approx(kl, nan_ok=True)
    assert kl_N.isfinite().sum() == 3


def test_a_model_whose_logits_are_not_numbers_has_no_divergence(original, batches):
    broken = tiny_llama()
    broken.lm_head.weight.data.mul_(math.nan)
    result = measure(original, broken, batches, 8)
    assert math.isnan(result.kl_mean)
    assert math.isnan(result.kl_p99)
    assert result.top1_agreement == 0
