"""Jobs: what a run or a sweep makes, and in which order it can be made.

A job is named by what it makes, so that runs of a sweep that share an artifact share its job. It produces artifacts of
the store; if the store has them all, the job need not be run. Some files of an artifact can be enough for a job to
start while another one still makes the rest. Nothing here knows where a job runs: `here.py` and `on_ray.py` do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lqer.stages.base import Stage
from lqer.store.store import Store


class Loaded(Protocol):
    """A model in memory."""

    def release(self) -> None: ...


@dataclass(frozen=True)
class Progress:
    """What a bar shows of a job: jobs of one title have one bar, on which this one is `amount` units.

    counted: of a job that makes the artifact of its name, how the names of files begin that are one unit each.
    """

    title: str
    unit: str = "job"
    amount: int = 1
    counted: str | None = None


@dataclass(frozen=True)
class Job:
    """produces: the stages whose artifacts it makes, or makes parts of. needs: names of the jobs that come before.

    seconds: about how long it takes, beside the others. model: what it leaves in memory for a job of the same model,
    if the process goes on to another one. at_home: it needs the folder of the run, not only the store. enough: of jobs
    in `needs` that make the artifact of their name, the files of it that this one reads: it can start once these are
    there.
    """

    name: str
    produces: tuple[Stage, ...]
    needs: tuple[str, ...]
    work: Callable[[Store], object]
    seconds: float = 1.0
    progress: Progress = Progress("jobs")
    model: Loaded | None = None
    at_home: bool = False
    enough: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def is_done(self, store: Store) -> bool:
        """Raises StoreError for an artifact whose manifest is damaged."""
        return bool(self.produces) and all(stage.find(store) is not None for stage in self.produces)


class Schedule:
    """Which jobs can start, as others finish or fail. Jobs of equal name are one.

    The job comes first from whose start to the end of all jobs that wait for it, directly or not, it is longest: so the
    workers end together. Jobs for which that is equal come in the order given. With `stops_at_failure` none starts
    after one has failed.
    """

    def __init__(self, jobs: Iterable[Job], done: Iterable[str] = (), stops_at_failure: bool = False):
        self.jobs: dict[str, Job] = {}
        for job in jobs:
            self.jobs.setdefault(job.name, job)
        self.done = set(done)
        self.failed: dict[str, str] = {}
        self.stops_at_failure = stops_at_failure
        self._started: set[str] = set()
        self._files: dict[str, set[str]] = {}
        self._seconds_left = _seconds_left(self.jobs)

    def ready(self) -> list[str]:
        """The jobs that can start now, the first one first."""
        if self.failed and self.stops_at_failure:
            return []
        found = [name for name in self._waiting() if not any(self._lacks(name, need) for need in self.jobs[name].needs)]
        return sorted(found, key=lambda name: -self._seconds_left[name])

    def is_early(self, name: str) -> bool:
        """Whether a job that can start needs one that has not ended."""
        return not self.done.issuperset(self.jobs[name].needs)

    def awaited(self) -> set[str]:
        """The jobs of which some files let others start before they end; the store may have them (`see`)."""
        return {need for name in self._waiting() for need in self.jobs[name].enough if self._lacks(name, need)}

    def see(self, name: str, files: Collection[str]) -> None:
        """The artifact of that name has these files by now."""
        self._files.setdefault(name, set()).update(files)

    def _waiting(self) -> list[str]:
        begun = self._started | self.done | self.failed.keys()
        return [name for name in self.jobs if name not in begun]

    def _lacks(self, name: str, need: str) -> bool:
        """Whether a job cannot start before another one ends, or makes more files."""
        if need in self.done:
            return False
        enough = self.jobs[name].enough.get(need)
        return enough is None or not self._files.get(need, set()).issuperset(enough)

    def start(self, name: str) -> None:
        self._started.add(name)

    def again(self, name: str) -> None:
        """Take back a job whose worker was lost."""
        self._started.remove(name)

    def finish(self, name: str) -> None:
        self._started.discard(name)
        self.done.add(name)

    def fail(self, name: str, line: str) -> None:
        """The job failed, and with it every job that waits for it, for the same reason."""
        self._started.discard(name)
        self.failed[name] = line
        for other in self._waiting():
            if name in self.jobs[other].needs and other not in self.failed:
                self.fail(other, line)

    @property
    def is_over(self) -> bool:
        return not self._started and not self.ready()


def _seconds_left(jobs: dict[str, Job]) -> dict[str, float]:
    """For each job, its own seconds and those of the longest chain of jobs that wait for it."""
    after: dict[str, float] = dict.fromkeys(jobs, 0.0)
    # A job stands after those it needs.
    for name in reversed(jobs):
        for need in jobs[name].needs:
            after[need] = max(after[need], after[name] + jobs[name].seconds)
    return {name: job.seconds + after[name] for name, job in jobs.items()}
