"""A store of artifacts: folders named by the key of what made them, complete or absent.

An artifact is built in `<name>.partial`, file by file: each file is written to a temporary name, synced and renamed,
then entered with its hash into a journal. A killed build resumes from the files in the journal. A finished build gets
a manifest and its final name. Every file is checked against its recorded hash before it is used; a damaged file is
refused by name.

An artifact has one lock. A process that builds it alone holds the lock throughout; processes that build parts of it
hold the lock for each file they write, so that the journal lists the files of all of them.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqer.errors import StoreError
from lqer.phases import in_phase, phase
from lqer.store.files import content_hash, fsync, hash_file, json_text, write_atomically, write_json

SECONDS_BETWEEN_REMINDERS = 60.0
MANIFEST = "manifest.json"
JOURNAL = "journal.json"


class Artifact:
    """A finished, read-only folder of the store."""

    def __init__(self, path: Path):
        self.path = path
        self._verified: set[str] = set()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return _read_record(self.path / MANIFEST, {"files": dict, "seconds": (int, float)})

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
            _check(path, self.manifest["files"].get(name), self.path)
            self._verified.add(name)
        return path

    def verify(self) -> None:
        """Check every file, and that there are no others. Raises StoreError."""
        for name in self.manifest["files"]:
            self.file(name)
        for path in self.path.iterdir():
            # A kill between an artifact's rename and its last step leaves the journal.
            if path.name not in self.manifest["files"] and path.name not in (MANIFEST, JOURNAL):
                raise StoreError(f"{path} is not in the manifest; {_mend(self.path)}")

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.file(name))

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text(encoding="utf-8"))


class Workspace:
    """An artifact being built; journalled files survive a kill.

    Several processes may write to one folder, each under `guard`, the artifact's lock. Once `is_finished` says that
    another process has finished the artifact, writes do nothing.
    """

    def __init__(
        self,
        path: Path,
        guard: AbstractContextManager | None = None,
        is_finished: Callable[[], bool] = lambda: False,
    ):
        self.path = path
        self._guard = guard or nullcontext()
        self._is_finished = is_finished
        path.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, str] = {}
        self._seconds = 0.0
        self._since = time.monotonic()
        self.refresh()
        for name, recorded in self._files.items():
            _check(path / name, recorded, path)

    def refresh(self) -> None:
        """Read the journal again: other processes may have written files."""
        if not (self.path / JOURNAL).exists():
            return
        journal = _read_record(self.path / JOURNAL, {"files": dict, "seconds": (int, float)})
        self._files, self._seconds = journal["files"], journal["seconds"]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """The files written so far, sorted."""
        return sorted(self._files)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / name)

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of any device as safetensors, sorted by name, so that equal tensors give equal bytes."""
        with phase("write"):
            ready = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}

        def save(temporary: Path) -> None:
            try:
                save_file(ready, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                # The library wraps the system's refusal of a write, such as that of a full disk.
                raise OSError(errno.EIO, str(error), str(self.path / name)) from error

        self.write(name, save)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, lambda temporary: temporary.write_text(json_text(value), encoding="utf-8"))

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        with self._guard:
            if self._is_finished():
                return
            self.refresh()
            if self._files.pop(name, None) is not None:
                # Before the file changes: a kill in between must not leave it unlike its entry.
                self._write_journal()
            with phase("write"):
                write_atomically(self.path / name, write)
            with phase("hash"):
                self._files[name] = hash_file(self.path / name)
            self._write_journal()

    def remove(self, name: str) -> None:
        """Remove a file from the journal, then delete it; a kill in between leaves a stray, which `finish` deletes."""
        with self._guard:
            self.refresh()
            del self._files[name]
            self._write_journal()
            (self.path / name).unlink(missing_ok=True)

    def finish(self, destination: Path, key: Any) -> None:
        self._spend()
        manifest = {"key": key, "files": dict(sorted(self._files.items())), "seconds": round(self._seconds, 3)}
        write_json(self.path / MANIFEST, manifest)
        for stray in self.path.iterdir():
            if stray.name not in (MANIFEST, JOURNAL) and stray.name not in self._files:
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
        self.path.rename(destination)
        fsync(destination.parent)
        # After the rename, so that a kill before it can still resume.
        (destination / JOURNAL).unlink(missing_ok=True)

    def _write_journal(self) -> None:
        self._spend()
        write_json(self.path / JOURNAL, {"files": self._files, "seconds": self._seconds})

    def _spend(self) -> None:
        """Add the time since the last file to the build time of all processes."""
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now


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
        path = self.path(stage, key)
        if not path.exists():
            return None
        artifact = Artifact(path)
        _ = artifact.manifest
        # The last step of a build that was killed before it; what another user's store keeps of it does no harm.
        with suppress(OSError):
            (path / JOURNAL).unlink(missing_ok=True)
        return artifact

    def obtain(self, stage: str, key: Any, make: Callable[[Workspace], None]) -> Artifact:
        """Return the artifact, built by `make` if the store does not have it.

        If several processes ask for the same artifact, one builds it and the others wait. Raises StoreError if files of
        an interrupted or finished build are damaged.
        """
        path = self.path(stage, key)
        with self._locked(path):
            artifact = self.find(stage, key)
            if artifact is None:
                workspace = Workspace(partial_path(path))
                make(workspace)
                workspace.finish(path, key)
                artifact = Artifact(path)
            return artifact

    def contribute(
        self,
        stage: str,
        key: Any,
        write_part: Callable[[Workspace], None],
        is_whole: Callable[[Workspace], bool],
        finish: Callable[[Workspace], None],
    ) -> Artifact | None:
        """Build a part of an artifact, alongside other processes that build the other parts.

        `write_part` writes this process's files. If `is_whole` then finds every part, `finish` writes the rest and the
        artifact is returned; else None. Raises StoreError as `obtain` does.
        """
        path = self.path(stage, key)
        with self._locked(path) as lock:
            artifact = self.find(stage, key)
            if artifact is not None:
                return artifact
            workspace = Workspace(partial_path(path), lock, lambda: self.find(stage, key) is not None)
        write_part(workspace)
        with self._locked(path, lock):
            artifact = self.find(stage, key)
            if artifact is not None:
                return artifact
            workspace.refresh()
            if not is_whole(workspace):
                return None
            finish(workspace)
            workspace.finish(path, key)
            return Artifact(path)

    @contextmanager
    def _locked(self, path: Path, lock: BaseFileLock | None = None) -> Iterator[BaseFileLock]:
        self.root.mkdir(parents=True, exist_ok=True)
        lock = lock or FileLock(path.with_name(f".{path.name}.lock"))
        patience = 0.0
        while not lock.is_locked:
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                patience = SECONDS_BETWEEN_REMINDERS
                self._say(
                    f"waiting for another process that builds {path.name}; if there is none, on no host, remove "
                    f"{lock.lock_file}"
                )
        try:
            yield lock
        finally:
            lock.release()


def _read_record(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest or journal with entries of these types. Raises StoreError if it is missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; {_mend(path.parent)}") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise StoreError(f"{path} is damaged ({error}); {_mend(path.parent)}") from None
    for name, kinds in types.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kinds):
            raise StoreError(f'{path} is damaged (no valid entry "{name}"); {_mend(path.parent)}')
    return record


@in_phase("verify")
def _check(path: Path, recorded: str | None, folder: Path) -> None:
    if not path.is_file():
        raise StoreError(f"{path} is missing; {_mend(folder)}")
    if recorded is None:
        raise StoreError(f"{path} is not in the manifest; {_mend(folder)}")
    if hash_file(path) != recorded:
        raise StoreError(f"{path} is damaged (its hash is not the recorded one); {_mend(folder)}")


def _mend(folder: Path) -> str:
    return f"remove {folder} to rebuild it"
