"""Hashes of large files that are asked for in every run, remembered as long as the files are what they were.

What a file was is told by its path, size, time of last change and inode. A file that changed a moment before it was
hashed is not remembered: within the resolution of its time it could change once more.

Hashing needs none of the libraries that a run imports, so a command begins it beside them (`begin`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lqer.store.files import hash_file, write_json

FINGERPRINTS = ".fingerprints.json"
# Each file is hashed by all threads; others are read meanwhile.
FILES_AT_ONCE = 8
# Coarser than the times of any file system in use.
SETTLED_NS = 2_000_000_000

# Size in bytes, time of the last change in nanoseconds, inode.
State = tuple[int, int, int]
# Hashes that this process began before they were asked for, by path and state of the file.
_begun: dict[tuple[str, State], Future[str]] = {}


class Fingerprints:
    """Hashes of files, remembered in the file `path`; with None, computed anew each time."""

    def __init__(self, path: Path | None = None):
        self._path = path
        self._known: dict[str, tuple[State, str]] = {}
        self._has_news = False
        # A record that cannot be read costs the time to hash.
        with suppress(OSError, ValueError, TypeError, AttributeError):
            entries = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
            self._known = {str(name): (_state(*state), str(digest)) for name, (state, digest) in entries.items()}

    def of(self, files: Sequence[Path]) -> list[str]:
        """The BLAKE3 (hex) of every file. Raises OSError, which names the file."""
        with ThreadPoolExecutor(max_workers=FILES_AT_ONCE) as threads:
            return list(threads.map(self._of, files))

    def begin(self, files: Sequence[Path]) -> None:
        """Hash in threads what is not remembered; `of`, of any instance, then waits for them. No error is told here."""
        threads = ThreadPoolExecutor(max_workers=FILES_AT_ONCE, thread_name_prefix="hash")
        for file in files:
            with suppress(OSError):
                name, state = str(file.resolve()), state_of(file)
                if not self._remembers(name, state) and _is_settled(state):
                    _begun[name, state] = threads.submit(hash_file, file)
        threads.shutdown(wait=False)

    def save(self) -> None:
        """Write down what was hashed since."""
        if self._has_news and self._path is not None:
            write_json(self._path, self._known)
            self._has_news = False

    def _of(self, file: Path) -> str:
        try:
            return self._look_up(file)
        except OSError as error:
            # Calls on an open file do not say which file it is.
            raise OSError(error.errno, error.strerror, str(file)) from error

    def _look_up(self, file: Path) -> str:
        name, before = str(file.resolve()), state_of(file)
        if self._remembers(name, before):
            return self._known[name][1]
        begun = _begun.get((name, before))
        digest = hash_file(file) if begun is None else begun.result()
        if state_of(file) == before and _is_settled(before):
            self._known[name] = (before, digest)
            self._has_news = True
        return digest

    def _remembers(self, name: str, state: State) -> bool:
        return name in self._known and self._known[name][0] == state


def _is_settled(state: State) -> bool:
    """Whether another change of the file would show in its time."""
    return time.time_ns() - state[1] > SETTLED_NS


def state_of(file: Path) -> State:
    """Whatever changes a file changes one of the three, but within the resolution of its time. Raises OSError."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _state(size: int, changed: int, inode: int) -> State:
    return int(size), int(changed), int(inode)
