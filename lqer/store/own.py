"""A folder of one process, for copies of what others have: removed with it, or by the next process if it was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

BEGINNING = "lqer-worker-"
LOCK = ".lock"


class OwnFolder:
    """A folder under TMPDIR. What processes that are gone have left there is removed first."""

    def __init__(self) -> None:
        under = Path(tempfile.gettempdir())
        _remove_left(under)
        self.path = under / f"{BEGINNING}{os.getuid()}-{uuid.uuid4().hex}"
        # Held as long as the process lives, whatever ends it.
        self._lock = FileLock(self.path.with_suffix(LOCK))
        self._lock.acquire()
        self.path.mkdir()

    def clear(self, but: str) -> None:
        """Remove everything but files of this name."""
        # What is in a folder comes before it.
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir():
                with suppress(OSError):
                    path.rmdir()
            elif path.name != but:
                path.unlink()

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def _remove_left(under: Path) -> None:
    for path in under.glob(f"{BEGINNING}{os.getuid()}-*{LOCK}"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
        lock.release()
