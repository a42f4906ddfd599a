"""Tokens that two texts share, against a search written out here."""

from __future__ import annotations

import numpy as np
import pytest

from lqer.data.overlap import RUN_TOKENS, shared_tokens


def text(seed: int, length: int, vocabulary: int = 50_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocabulary, size=length)


def test_texts_of_their_own_share_nothing():
    assert shared_tokens(text(0, 10_000), text(1, 10_000)) == 0


@pytest.mark.parametrize("offset", [0, 1, 63, 64, 1000])
def test_a_copy_is_found_wherever_it_stands(offset):
    seen = text(0, 10 * RUN_TOKENS)
    evaluated = np.concatenate([text(1, offset), seen[2 * RUN_TOKENS : 5 * RUN_TOKENS], text(2, 500)])
    assert shared_tokens(seen, evaluated) == 3 * RUN_TOKENS


def test_a_run_that_differs_in_one_token_is_no_copy():
    seen = text(0, RUN_TOKENS)
    for position in (0, 30, RUN_TOKENS - 1):
        changed = seen.copy()
        changed[position] += 1
        assert shared_tokens(seen, changed) == 0


def test_it_is_the_same_as_a_plain_search_where_runs_repeat():
    # Few distinct runs of few distinct tokens, so that many are shared.
    rng = np.random.default_rng(3)
    pieces = rng.integers(2, size=(6, RUN_TOKENS))
    seen, evaluated = (pieces[rng.integers(6, size=9)][:, None].reshape(-1) for _ in range(2))
    evaluated = evaluated[7 : 5 * RUN_TOKENS]
    runs = {tuple(evaluated[start : start + RUN_TOKENS]) for start in range(len(evaluated) - RUN_TOKENS + 1)}
    found = [tuple(seen[start : start + RUN_TOKENS]) in runs for start in range(0, len(seen), RUN_TOKENS)]
    assert 0 < sum(found) < len(found)
    assert shared_tokens(seen, evaluated) == RUN_TOKENS * sum(found)


@pytest.mark.parametrize(("seen", "evaluated"), [(0, 100), (63, 100), (100, 0), (100, 63)])
def test_a_text_shorter_than_a_run_shares_nothing(seen, evaluated):
    assert shared_tokens(text(0, seen), text(0, evaluated)) == 0
