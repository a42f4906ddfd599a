"""Bars of jobs that are done elsewhere."""

from __future__ import annotations

import re
from functools import partial

from tqdm import tqdm

from lqer.jobs import progress
from lqer.jobs.graph import Job, Progress, Schedule
from lqer.jobs.progress import shown


def job(name: str, of: Progress) -> Job:
    return Job(name, (), (), lambda store: None, progress=of)


JOBS = [
    job("first", Progress("quantize", "block", 4)),
    job("second", Progress("quantize", "block", 3)),
    job("text", Progress("perplexity", "window", 40)),
]


def test_there_is_a_bar_for_each_kind_of_work_in_its_own_unit(capsys, monkeypatch):
    # Whatever TQDM_DISABLE says.
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, disable=False, mininterval=0))
    with shown(Schedule(JOBS, done=["first"])) as bars:
        bars.end(JOBS[2])
        bars.end(JOBS[1], "node/1, 2.0 s")
    lines = re.split(r"[\r\n]|\x1b\[A", capsys.readouterr().err)
    last = {title: line for line in lines for title in re.findall(r"^\w+", line)}
    assert "7/7" in last["quantize"]
    assert "block" in last["quantize"]
    assert "node/1, 2.0 s" in last["quantize"]
    assert "40/40" in last["perplexity"]
    assert "window" in last["perplexity"]


def test_a_job_that_goes_on_has_as_many_units_as_files(capsys, monkeypatch):
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, disable=False, mininterval=0))
    whole = job("whole", Progress("calibrate", "block", 4, counted="block-"))
    shows = []

    def shown_last() -> str:
        return re.findall(r"\d/\d", capsys.readouterr().err)[-1]

    with shown(Schedule([whole, *JOBS])) as bars:
        for files in (["block-0", "sites-0", "sites-1"], ["block-0", "block-1", "sites-1"]):
            bars.count(whole, files)
            shows.append(shown_last())
        # Its worker was lost and it is done again; then it ends.
        bars.count(whole, ["block-0", "block-1"])
        bars.end(whole)
        shows.append(shown_last())
        # A part, whose bar counts what ends.
        bars.count(JOBS[0], ["block-0"])
    assert shows == ["1/4", "2/4", "4/4"]
    assert "0/7" in capsys.readouterr().err
