"""A short form of the campaign of writes that fail."""

from __future__ import annotations

import disk
import pytest


def test_a_write_that_fails_costs_one_line_and_no_work(server, workplace):
    if not server.has_library:
        pytest.skip("no C compiler to make writes fail with")
    tally = disk.campaign(server, workplace, count=5, seed=1)
    assert not tally.failures, "\n".join(tally.failures)
