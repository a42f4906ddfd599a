"""One thread that writes files in their order, while the process goes on with its work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lqer.phases import phase


def most_waiting(on_gpu: bool) -> int:
    """Bytes of the host's memory that may wait to be written; a GPU's work holds little of it."""
    return 1 << 32 if on_gpu else 1 << 28


class Writer:
    """Runs jobs one after another in a thread of its own.

    After one that fails no other is run, so that nothing is written without what belongs before it. Its exception is
    raised in the thread that hands in the next job, or that waits. most_waiting: bytes that all jobs may hold together.
    """

    def __init__(self, most_waiting: int) -> None:
        self._most = most_waiting
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")
        self._jobs: deque[tuple[Future[None], int]] = deque()
        self._failure: BaseException | None = None

    def submit(self, job: Callable[[], object], size: int) -> None:
        """Hand in a job that holds `size` bytes until it is done.

        Waits for earlier jobs where all together would hold too much, and for the job itself if it alone does.
        """
        with phase("write"):
            self._wait_until(lambda: sum(held for _, held in self._jobs) + size <= self._most)
            self._jobs.append((self._thread.submit(self._run, job), size))
            if size > self._most:
                self.wait()

    def wait(self) -> None:
        """Wait until every job is done. Raises the exception of one that failed."""
        with phase("write"):
            self._wait_until(lambda: False)

    def close(self) -> None:
        """End the thread when every job is done; nothing is raised."""
        self._thread.shutdown(wait=True)

    def _wait_until(self, is_enough: Callable[[], bool]) -> None:
        while self._jobs and (self._jobs[0][0].done() or not is_enough()):
            self._jobs[0][0].result()
            self._jobs.popleft()

    def _run(self, job: Callable[[], object]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            job()
        except BaseException as error:
            self._failure = error
            raise
