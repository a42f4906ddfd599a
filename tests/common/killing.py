"""Kills at a chosen point, for tests of resuming: of a workspace within the test, or of a process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lqer.store.store import Workspace


class KilledError(BaseException):
    """Stands for a kill: no handler of the code under test catches it."""


def dying_workspace(at_write: int | str | None = None, at_removal: int | None = None) -> Callable[[Path], Workspace]:
    """A constructor of workspaces, in place of `Workspace`, that raise KilledError.

    at_write: before the write with that index, or of the file with that name. at_removal: before the removal with that
    index. Counted from 0 over all workspaces that the constructor makes.
    """
    written: list[str] = []
    removed: list[str] = []

    class Dying(Workspace):
        def write(self, name: str, write: Callable[[Path], Any], size: int = 0) -> None:
            if at_write in (name, len(written)):
                raise KilledError
            written.append(name)
            super().write(name, write, size)

        def remove(self, name: str) -> None:
            if at_removal == len(removed):
                raise KilledError
            removed.append(name)
            super().remove(name)

    return Dying


def signalled_command(command: Sequence[str], number: signal.Signals, at_write: int) -> list[str]:
    """A command of a Python script that sends itself a signal in the middle of the write with that index.

    The content is written, but not yet under its own name nor in the journal.
    """
    code = f"""
import os, runpy, signal, sys
# A shell in the background starts its processes with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from lqer.store.store import Workspace
original, count = Workspace.write, 0
def write(self, name, content, size=0):
    global count
    def content_and_signal(path):
        content(path)
        os.kill(os.getpid(), {int(number)})
    count += 1
    original(self, name, content_and_signal if count == {at_write + 1} else content, size)
Workspace.write = write
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    interpreter, *arguments = command
    return [interpreter, "-c", code, *arguments]
