"""Seconds that a process spends in each phase of its work, such as "read" or "pack", where somebody records them.

    with phase("pack"):
        packed = pack_linears(...)

A phase inside another one interrupts it, so that no second counts twice. Work of other threads is counted apart from
the main thread's, beside which it runs. While nothing records, a phase costs a comparison.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")


class Recorder:
    """main, background: seconds by phase, of the main thread and of all others.

    synchronize: waits for the GPU. It is called in the main thread, whenever a phase begins or ends, so that kernels
    count where they were launched; another thread would wait for what the main one has launched.
    """

    def __init__(self, synchronize: Callable[[], object] = lambda: None):
        self.main: Counter[str] = Counter()
        self.background: Counter[str] = Counter()
        self._synchronize = synchronize
        self._lock = threading.Lock()
        self._threads = threading.local()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds within as the phase's, except those of phases inside it."""
        if not hasattr(self._threads, "open"):
            self._threads.open = []
        self._count()
        self._threads.open.append(name)
        try:
            yield
        finally:
            self._count()
            self._threads.open.pop()

    def _count(self) -> None:
        """Add the time since the last change of phases to the innermost open one of this thread."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main:
            self._synchronize()
        now = time.perf_counter()
        if self._threads.open:
            with self._lock:
                (self.main if is_main else self.background)[self._threads.open[-1]] += now - self._threads.since
        self._threads.since = now


_NOTHING = nullcontext()
_recorder: Recorder | None = None


def phase(name: str) -> AbstractContextManager[None]:
    """The context of one phase of the work."""
    return _NOTHING if _recorder is None else _recorder.phase(name)


def in_phase(name: str) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """A decorator of functions whose whole work is one phase."""

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        @wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> Result:
            with phase(name):
                return function(*args, **kwargs)

        return measured

    return decorate


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Let the recorder count the phases of everything that runs within."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before
