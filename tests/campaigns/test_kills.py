"""A short form of the campaign of kills: a few kills of every configuration, by every kind of event."""

from __future__ import annotations

import kills


def test_runs_killed_at_any_moment_end_with_the_bytes_of_an_undisturbed_one(server, workplace):
    tally = kills.campaign(server, workplace, count=6, seed=1)
    assert not tally.failures, "\n".join(tally.failures)
