"""A short form of the campaign of architectures: one of every way in which blocks are called, and some to refuse."""

from __future__ import annotations

import architectures
import pytest

WALKED = ["gpt2", "bloom"]
# Looped stacks, arguments that depend on the tokens, experts, states beside the hidden ones, no causal blocks.
HARD = ["hrm_text", "gemma4_text", "mixtral", "bert"]


@pytest.mark.parametrize("kind", [*WALKED, *HARD])
def test_an_architecture_is_walked_exactly_or_refused_at_once(server, workplace, kind):
    tally = architectures.campaign(server, workplace, count=1, seed=1, kinds=[kind])
    assert not tally.failures, "\n".join(tally.failures)
