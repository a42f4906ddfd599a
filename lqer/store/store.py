"""A content-addressed store of artifacts: folders named after what made them, whole or not there at all.

An artifact's name is a hash of its stage, that stage's code version, its settings and the contents of its inputs. It is
built in `<name>.partial`, file by file; each file is written beside its place, synced and renamed, then entered with
its sha256 into a journal. A killed build goes on with the files that the journal vouches for. A finished one gets a
manifest and its name. Every file is checked against its recorded sha256 before it is used: a damaged one is refused by
name.

An artifact has one lock. Who makes it alone holds the lock throughout; processes that make shares of it hold it for
each file they write. So the journal knows the files of all of them, and nobody finishes under another's hands.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqer.errors import StoreError
from lqer.store.files import content_hash, fsync, hash_file, json_text, write_atomically, write_json

MANIFEST = "manifest.json"
JOURNAL = "journal.json"


class Artifact:
    """A finished, read-only folder of the store."""

    def __init__(self, path: Path):
        self.path = path
        self._verified: set[str] = set()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path / MANIFEST} is damaged ({error}); {_mend(self.path)}") from None

    @property
    def content(self) -> str:
        """A hash of every file's content: what later stages name their own artifacts after."""
        return content_hash(self.manifest["files"])

    @property
    def seconds(self) -> float:
        """How long the making took, over all the processes that had a part in it."""
        return float(self.manifest["seconds"])

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["files"]

    def file(self, name: str) -> Path:
        """The path of one of the files, checked. Raises StoreError if it is not what was written."""
        path = self.path / name
        if name not in self._verified:
            _check(path, self.manifest["files"].get(name), self.path)
            self._verified.add(name)
        return path

    def verify(self) -> None:
        for name in self.manifest["files"]:
            self.file(name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.file(name))

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text(encoding="utf-8"))


class Workspace:
    """An artifact in the making: files already journalled survive a kill.

    Several processes may write to one folder, each under `guard`, the artifact's lock. `is_finished` tells whether
    another of them has finished the artifact: what is written then is dropped, being there already.
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
        """Learn of the files that other processes have written."""
        if not (self.path / JOURNAL).exists():
            return
        try:
            journal = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{self.path / JOURNAL} is damaged ({error}); {_mend(self.path)}") from None
        self._files, self._seconds = journal["files"], journal["seconds"]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """The files that are there, sorted."""
        return sorted(self._files)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / name)

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of any device as safetensors, their names sorted: same tensors, same bytes."""
        ready = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
        self.write(name, lambda beside: save_file(ready, beside, metadata={"format": "pt"}))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, lambda beside: beside.write_text(json_text(value), encoding="utf-8"))

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        with self._guard:
            if self._is_finished():
                return
            write_atomically(self.path / name, write)
            self.refresh()
            self._files[name] = hash_file(self.path / name)
            self._write_journal()

    def remove(self, name: str) -> None:
        """Forget a file that has served its purpose, then delete it: after a kill in between it is a stray."""
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
        # After the rename: a kill just before it must not cost the whole build.
        (destination / JOURNAL).unlink(missing_ok=True)

    def _write_journal(self) -> None:
        self._spend()
        write_json(self.path / JOURNAL, {"files": self._files, "seconds": self._seconds})

    def _spend(self) -> None:
        """Add this process's time since the last file to that of all processes."""
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now


def partial_path(path: Path) -> Path:
    """Where the artifact of that path is built."""
    return path.with_name(f"{path.name}.partial")


def stored_bytes(path: Path) -> int:
    """Bytes of an artifact's files, finished or in the making; another process may be writing to it."""
    size = 0
    for file in (*path.glob("*"), *partial_path(path).glob("*")):
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


class Store:
    """All artifacts under one folder, shared by any number of runs and processes."""

    def __init__(self, root: Path, say: Callable[[str], None] = lambda message: None):
        self.root = root
        self._say = say

    def path(self, stage: str, key: Any) -> Path:
        return self.root / f"{stage}-{content_hash({'stage': stage, 'key': key})[:16]}"

    def find(self, stage: str, key: Any) -> Artifact | None:
        """The artifact if it is finished."""
        path = self.path(stage, key)
        return Artifact(path) if (path / MANIFEST).exists() else None

    def obtain(self, stage: str, key: Any, make: Callable[[Workspace], None]) -> Artifact:
        """Return the artifact, made by `make` if it is not there yet.

        Of several processes that want the same one, the first makes it and the others wait. Raises StoreError if files
        of an interrupted or finished build are damaged.
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

    def share(
        self,
        stage: str,
        key: Any,
        contribute: Callable[[Workspace], None],
        is_whole: Callable[[Workspace], bool],
        make: Callable[[Workspace], None],
    ) -> Artifact | None:
        """Do a share of an artifact's making beside other processes.

        `contribute` writes the share's files. If all shares are there then, as `is_whole` tells, `make` writes what is
        left and the artifact is returned; else None. Raises StoreError as `obtain` does.
        """
        path = self.path(stage, key)
        with self._locked(path) as lock:
            artifact = self.find(stage, key)
            if artifact is not None:
                return artifact
            workspace = Workspace(partial_path(path), lock, lambda: self.find(stage, key) is not None)
        contribute(workspace)
        with self._locked(path, lock):
            artifact = self.find(stage, key)
            if artifact is not None:
                return artifact
            workspace.refresh()
            if not is_whole(workspace):
                return None
            make(workspace)
            workspace.finish(path, key)
            return Artifact(path)

    @contextmanager
    def _locked(self, path: Path, lock: BaseFileLock | None = None) -> Iterator[BaseFileLock]:
        self.root.mkdir(parents=True, exist_ok=True)
        lock = lock or FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._say(f"waiting for another process that makes {path.name}")
            lock.acquire()
        try:
            yield lock
        finally:
            lock.release()


def _check(path: Path, recorded: str | None, folder: Path) -> None:
    if not path.exists():
        raise StoreError(f"{path} is missing; {_mend(folder)}")
    if recorded is None:
        raise StoreError(f"{path} is not in the manifest; {_mend(folder)}")
    found = hash_file(path)
    if found != recorded:
        raise StoreError(f"{path} is damaged: sha256 {found[:12]}… where {recorded[:12]}… was written; {_mend(folder)}")


def _mend(folder: Path) -> str:
    return f"remove {folder} to have it made again"
