"""Progress bars of jobs that are done elsewhere: one for each kind of work, moved by who hands the jobs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from lqer.jobs.graph import Progress, Schedule


class Bars:
    """A bar for every title among the schedule's jobs, below each other."""

    def __init__(self, bars: dict[str, tqdm]):
        self._bars = bars

    def advance(self, progress: Progress, where: str = "") -> None:
        """A job is over; where: the worker that did it."""
        bar = self._bars[progress.title]
        bar.update(progress.amount)
        if where:
            bar.set_postfix_str(where, refresh=False)


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
