"""A short form of the campaign of damaged files."""

from __future__ import annotations

import damage


def test_a_damaged_file_is_refused_by_name_or_made_again(server, workplace):
    tally = damage.campaign(server, workplace, count=8, seed=1)
    assert not tally.failures, "\n".join(tally.failures)
