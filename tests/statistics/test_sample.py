"""Which tokens are sampled."""

from __future__ import annotations

import random

import torch

from lqer.statistics.sample import spread_indices


def test_sampled_tokens_are_spread_evenly_whatever_the_batches():
    rng = random.Random(0)
    for _ in range(300):
        tokens, sampled, batch = rng.randint(1, 500), rng.randint(1, 600), rng.randint(1, 60)
        whole = spread_indices(0, tokens, tokens, sampled)
        assert whole.tolist() == [i * tokens // min(sampled, tokens) for i in range(min(sampled, tokens))]
        parts = [
            spread_indices(first, min(batch, tokens - first), tokens, sampled) + first
            for first in range(0, tokens, batch)
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert len(whole) == min(sampled, tokens)
        gaps = whole.diff()
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
