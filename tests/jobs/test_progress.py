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
        bars.advance(JOBS[2].progress)
        bars.advance(JOBS[1].progress, "node/1, 2.0 s")
    lines = re.split(r"[\r\n]|\x1b\[A", capsys.readouterr().err)
    last = {title: line for line in lines for title in re.findall(r"^\w+", line)}
    assert "7/7" in last["quantize"]
    assert "block" in last["quantize"]
    assert "node/1, 2.0 s" in last["quantize"]
    assert "40/40" in last["perplexity"]
    assert "window" in last["perplexity"]
