"""Processes of this machine that do a part of the work: how they are started, and how a death is reported."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

# What a server imports beside that.
SERVED = "lqer.stages.served"


def processes(preload: Sequence[str]) -> BaseContext:
    """Starts processes that have imported these modules, where the system can: from a server that never computed.

    A process that has used a GPU must not be forked.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*preload, SERVED])
    return found


def expect_processes(preload: Sequence[str]) -> None:
    """Let the server of later `processes` import these modules from now on, beside other work."""
    if processes(preload).get_start_method() == "forkserver":
        forkserver.ensure_running()


@contextmanager
def held_back_interrupts() -> Iterator[None]:
    """Put off the KeyboardInterrupt of a SIGINT to the end, so that a process that is being started is not lost."""
    signals: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # Who starts a program in the background may have told it to ignore Ctrl-C.
    if handler == signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        # This replaces an error too: a process that Ctrl-C ended at its start is no failure of ours.
        if signals:
            raise KeyboardInterrupt


def death(exitcode: int | None) -> str:
    """How a process ended, after words such as "the process"."""
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended with status {exitcode}"
