"""A short form of the campaign of configurations: every hostile one by name, and mutated ones."""

from __future__ import annotations

import configurations
import pytest
from hostile import COMMANDS, DOCUMENTS

HOSTILE = [*DOCUMENTS, *COMMANDS]


def test_a_hostile_configuration_is_answered_with_one_line(server, workplace):
    tally = configurations.campaign(server, workplace, count=len(HOSTILE), seed=1)
    assert not tally.failures, "\n".join(tally.failures)


@pytest.mark.parametrize("seed", range(3))
def test_a_mutated_configuration_is_valid_or_refused_in_one_line(server, workplace, seed):
    first = len(HOSTILE)
    for number in range(first, first + 30):
        tally = configurations.campaign(server, workplace, count=0, seed=seed, only=number)
        assert not tally.failures, "\n".join(tally.failures)
