"""Works through jobs in this process, in the order in which they stand."""

from __future__ import annotations

from collections.abc import Iterable

from lqer.jobs.graph import Job
from lqer.store.store import Store


def run_here(jobs: Iterable[Job], store: Store) -> None:
    """Each job finds in the store what it has made before. The first exception ends the run."""
    for job in jobs:
        job.work(store)
