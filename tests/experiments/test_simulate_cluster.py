"""Simulated schedules: known answers, and the tables of the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulate_cluster
from simulate_cluster import job, simulate

PAGE = Path(__file__).parents[2] / "docs/cluster.md"


def test_two_workers_share_out_what_is_there():
    outcome = simulate([job("one", 3.0), job("two", 2.0), job("three", 1.0)], workers=2)
    assert (outcome.minutes, outcome.busy) == (3.0, 1.0)


def test_a_job_waits_for_those_it_needs():
    outcome = simulate([job("first", 2.0), job("then", 3.0, ["first"])], workers=2)
    assert (outcome.minutes, outcome.busy) == (5.0, 0.5)


@pytest.mark.parametrize(("waits", "minutes"), [(True, 7.0), (False, 5.0)])
def test_a_part_starts_with_the_statistics_of_its_blocks(waits, minutes):
    """Those of a block come every minute; a part takes two."""
    parts = [job(f"part {block}", 2.0, ["calibrate"], () if waits else [block]) for block in range(3)]
    assert simulate([job("calibrate", 3.0), *parts], workers=2).minutes == minutes


@pytest.mark.parametrize(("knows_lengths", "minutes"), [(True, 4.0), (False, 6.0)])
def test_the_longest_first_ends_earlier(knows_lengths, minutes):
    jobs = [*(job(f"short {index}", 1.0) for index in range(4)), job("long", 4.0)]
    assert simulate(jobs, workers=2, knows_lengths=knows_lengths).minutes == minutes


def test_the_page_shows_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["simulate_cluster.py"])
    simulate_cluster.main()
    assert capsys.readouterr().out.strip() in PAGE.read_text()
