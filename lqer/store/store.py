"""A store of artifacts: folders named by the key of what made them, complete or absent.

An artifact is built in `<name>.partial`, file by file: each file is written to a temporary name, synced and renamed,
then entered with its hash into a journal. A killed build resumes from the files in the journal. A finished build gets
a manifest and its final name. Every file is checked against its recorded hash before it is used; a damaged file is
refused by name.

An artifact has one lock. A process that builds it alone holds the lock throughout; processes that build parts of it
hold the lock while they enter a file, so that the journal lists the files of all of them. Who reads needs no lock: a
file is in the journal once it is there as it stays.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock, FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from lqer.errors import StoreError
from lqer.store.files import content_hash
from lqer.store.records import JOURNAL, MANIFEST, check_file, mend, read_record
from lqer.store.workspace import Workspace

SECONDS_BETWEEN_REMINDERS = 60.0
# How often it is looked for files that another process makes.
SECONDS_BETWEEN_LOOKS = 0.2

T = TypeVar("T")


class Artifact:
    """A finished, read-only folder of the store; with a journal as its `record`, what there is of an unfinished one."""

    def __init__(self, path: Path, record: str = MANIFEST):
        self.path = path
        self._record = record
        self._verified: set[str] = set()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_record(self.path / self._record, {"files": dict, "seconds": (int, float)})

    @property
    def content(self) -> str:
        """A hash of the contents of all files."""
        return content_hash(self.manifest["files"])

    @property
    def seconds(self) -> float:
        """Build time, summed over all processes that took part."""
        return float(self.manifest["seconds"])

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["files"]

    def file(self, name: str) -> Path:
        """The path of a file whose hash has been checked. Raises StoreError if the file was changed."""
        path = self.path / name
        if name not in self._verified:
            check_file(path, self.manifest["files"].get(name), self.path)
            self._verified.add(name)
        return path

    def verify(self, except_for: Collection[str] = ()) -> None:
        """Check every file not in `except_for`, and that there are no others. Raises StoreError."""
        for name in self.manifest["files"]:
            if name not in except_for:
                self.file(name)
        for path in self.path.iterdir():
            # A kill between an artifact's rename and its last step leaves the journal.
            if path.name not in self.manifest["files"] and path.name not in (MANIFEST, JOURNAL):
                raise StoreError(f"{path} is not in the manifest; {mend(self.path)}")

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.file(name))

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text(encoding="utf-8"))


def partial_path(path: Path) -> Path:
    """The folder in which the artifact at `path` is built."""
    return path.with_name(f"{path.name}.partial")


def stored_bytes(path: Path) -> int:
    """Bytes of an artifact's files, finished or not; another process may be writing to it."""
    size = 0
    for folder in (path, partial_path(path)):
        # The other process may rename the folder, or a file in it, at any moment.
        with suppress(FileNotFoundError):
            for file in folder.iterdir():
                with suppress(FileNotFoundError):
                    size += file.stat().st_size
    return size


class Store:
    """All artifacts in one folder, shared by any number of runs and processes."""

    def __init__(self, root: Path, say: Callable[[str], None] = lambda message: None):
        self.root = root
        self._say = say

    @staticmethod
    def name_of(stage: str, key: Any) -> str:
        """The name of an artifact's folder."""
        return f"{stage}-{content_hash({'stage': stage, 'key': key})[:16]}"

    def path(self, stage: str, key: Any) -> Path:
        return self.root / self.name_of(stage, key)

    def find(self, stage: str, key: Any) -> Artifact | None:
        """The artifact, if it is finished. Raises StoreError if its manifest is missing or damaged."""
        return self.named(self.name_of(stage, key))

    def named(self, name: str) -> Artifact | None:
        """The same by the name of its folder."""
        path = self.root / name
        if not path.exists():
            return None
        artifact = Artifact(path)
        _ = artifact.manifest
        # The last step of a build that was killed before it; what another user's store keeps of it does no harm.
        with suppress(OSError):
            (path / JOURNAL).unlink(missing_ok=True)
        return artifact

    def files(self, name: str) -> Collection[str]:
        """The files that an artifact has so far, finished or not. Raises StoreError if their record is damaged."""
        path = self.root / name
        if not (path.exists() or (partial_path(path) / JOURNAL).exists()):
            return ()
        return self.read(name, lambda found: found.manifest["files"])

    def read(self, name: str, read: Callable[[Artifact], T]) -> T:
        """What `read` makes of an artifact, finished or not, by the name of its folder.

        Raises StoreError for a file that it does not have yet, or a damaged one.
        """
        if (artifact := self.named(name)) is not None:
            return read(artifact)
        try:
            return read(self._unfinished(self.root / name))
        except (FileNotFoundError, StoreError):
            # Who finishes an artifact renames its folder.
            if (artifact := self.named(name)) is None:
                raise
            return read(artifact)

    def obtain(self, stage: str, key: Any, make: Callable[[Workspace], None]) -> Artifact:
        """Return the artifact, built by `make` if the store does not have it.

        If several processes ask for the same artifact, one builds it and the others wait. Raises StoreError if files of
        an interrupted or finished build are damaged.
        """
        path = self.path(stage, key)
        with self.locked(path):
            artifact = self.find(stage, key)
            return artifact if artifact is not None else self._built(path, key, make)

    def provide(
        self, stage: str, key: Any, files: Collection[str], make: Callable[[Workspace], None]
    ) -> Artifact | None:
        """Return once an artifact has these files: at once, when another process has made them, else it is built here.

        Returns what was built here.
        """
        path = self.path(stage, key)

        def are_there() -> bool:
            return set(files) <= set(self.files(path.name))

        with self.locked(path, unless=are_there):
            return None if are_there() else self._built(path, key, make)

    def _built(self, path: Path, key: Any, make: Callable[[Workspace], None]) -> Artifact:
        """The artifact at `path`, whose lock is held."""
        workspace = self._workspace(path)
        make(workspace)
        workspace.finish(path, key)
        return self._finished(path)

    def contribute(
        self,
        stage: str,
        key: Any,
        write_part: Callable[[Workspace], None],
        is_whole: Callable[[Workspace], bool],
        finish: Callable[[Workspace], None],
    ) -> Artifact | None:
        """Build a part of an artifact, alongside other processes that build the other parts.

        `write_part` writes this process's files; it is called again where another process has removed what it reads,
        once that is no longer needed. If `is_whole` then finds every part, `finish` writes the rest and the artifact is
        returned; else None. Raises StoreError as `obtain` does.
        """
        path = self.path(stage, key)
        with self.locked(path) as lock:
            artifact = self.find(stage, key)
            if artifact is not None:
                return artifact
            workspace = self._workspace(path, lock)
        try:
            write_part(workspace)
        except (FileNotFoundError, StoreError):
            if self.find(stage, key) is None and not workspace.has_lost_files():
                raise
            return self.contribute(stage, key, write_part, is_whole, finish)
        with self.locked(path, lock):
            artifact = self.find(stage, key)
            if artifact is not None:
                return artifact
            workspace.refresh()
            if not is_whole(workspace):
                return None
            workspace.check()
            finish(workspace)
            workspace.finish(path, key)
            return self._finished(path)

    def _finished(self, path: Path) -> Artifact:
        """The artifact at `path`, which is there."""
        return Artifact(path)

    def _unfinished(self, path: Path) -> Artifact:
        """What there is of the artifact that will be at `path`."""
        return Artifact(partial_path(path), JOURNAL)

    def _workspace(self, path: Path, lock: BaseFileLock | None = None) -> Workspace:
        """Where the artifact at `path` is built; with its lock, alongside other processes."""
        return Workspace(partial_path(path), lock, lambda: lock is not None and self.named(path.name) is not None)

    @contextmanager
    def locked(
        self, path: Path, lock: BaseFileLock | None = None, unless: Callable[[], bool] | None = None
    ) -> Iterator[BaseFileLock]:
        """Hold the lock of the artifact at `path`, released at the end and given to whoever enters files into it.

        unless: what ends the wait for it, without the lock.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = lock or FileLock(path.with_name(f".{path.name}.lock"))
        patience, reminded = 0.0, -math.inf
        while not (lock.is_locked or (unless is not None and unless())):
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                patience = SECONDS_BETWEEN_REMINDERS if unless is None else SECONDS_BETWEEN_LOOKS
                if time.monotonic() - reminded < SECONDS_BETWEEN_REMINDERS:
                    continue
                reminded = time.monotonic()
                self._say(
                    f"waiting for another process that builds {path.name}; if there is none, on no host, remove "
                    f"{lock.lock_file}"
                )
        try:
            yield lock
        finally:
            lock.release()
