"""Progress bars of jobs that are done elsewhere: one for each kind of work, moved by who hands the jobs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from lqer.jobs.graph import Job, Schedule


class Bars:
    """A bar for every title among the schedule's jobs, below each other."""

    def __init__(self, bars: dict[str, tqdm]):
        self._bars = bars
        self._units = Counter[str]()

    def count(self, job: Job, files: Iterable[str]) -> None:
        """A job goes on, whose artifact has these files by now."""
        if job.progress.counted is not None:
            self._reach(job, sum(name.startswith(job.progress.counted) for name in files))

    def end(self, job: Job, where: str = "") -> None:
        """A job is over; where: the worker that did it."""
        if where:
            self._bars[job.progress.title].set_postfix_str(where, refresh=False)
        self._reach(job, job.progress.amount)

    def _reach(self, job: Job, units: int) -> None:
        self._bars[job.progress.title].update(units - self._units[job.name])
        self._units[job.name] = units


@contextmanager
def shown(schedule: Schedule) -> Iterator[Bars]:
    """The bars of a schedule, with what is done already."""
    jobs = schedule.jobs.values()
    total, done = Counter[str](), Counter[str]()
    for job in jobs:
        total[job.progress.title] += job.progress.amount
        if job.name in schedule.done:
            done[job.progress.title] += job.progress.amount
    units = {job.progress.title: job.progress.unit for job in jobs}
    with ExitStack() as stack:
        yield Bars(
            {
                title: stack.enter_context(
                    tqdm(total=total[title], initial=done[title], desc=title, unit=unit, position=place)
                )
                for place, (title, unit) in enumerate(units.items())
            }
        )
