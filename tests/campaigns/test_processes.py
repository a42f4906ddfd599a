"""A short form of the campaign of processes: eight at once on one store."""

from __future__ import annotations

import processes
import pytest


# One tag with one experiment is in tests/run/test_resume.py.
@pytest.mark.parametrize("mode", range(1, len(processes.MODES)), ids=list(processes.MODES)[1:])
def test_processes_on_one_store_do_not_mix_their_results(server, workplace, mode):
    tally = processes.campaign(server, workplace, count=1, seed=1, only=mode)
    assert not tally.failures, "\n".join(tally.failures)
