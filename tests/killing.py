"""Workspaces of a process that dies at a chosen point, for tests of resuming."""

from __future__ import annotations

from collections.abc import Callable
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
        def write(self, name: str, write: Callable[[Path], Any]) -> None:
            if at_write in (name, len(written)):
                raise KilledError
            written.append(name)
            super().write(name, write)

        def remove(self, name: str) -> None:
            if at_removal == len(removed):
                raise KilledError
            removed.append(name)
            super().remove(name)

    return Dying
