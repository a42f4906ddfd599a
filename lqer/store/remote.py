"""A store whose folder this machine does not see: what is made goes to a keeper, what is read comes from it.

    keeper (lqer/store/keeper.py), with the folder  <-- bytes of files -->  RemoteStore, with a folder of its own

A file is fetched when it is first read, except for the small ones that are no tensors, and compared with its recorded
hash. Copies stay in the own folder, which nobody else writes to and which is removed with the process. Stages see an
ordinary store.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import BaseFileLock

from lqer.store.files import write_json
from lqer.store.keeper import Keeper
from lqer.store.records import MANIFEST, check_file
from lqer.store.store import Artifact, Store, partial_path
from lqer.store.workspace import Workspace

TENSORS = ".safetensors"
# From the removal of parts to the end of an artifact; a process that is killed in between never ends it.
SECONDS_TO_FINISH = 30.0


class RemoteStore(Store):
    """root: the own folder. keeper: a Keeper, or what calls one elsewhere."""

    def __init__(self, root: Path, keeper: Keeper, say: Callable[[str], None] = lambda message: None):
        super().__init__(root, say)
        self._keeper = keeper

    def named(self, name: str) -> Artifact | None:
        path = self.root / name
        if not (path / MANIFEST).exists():
            manifest = self._keeper.manifest(name)
            if manifest is None:
                return None
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / MANIFEST, manifest)
        return self._finished(path)

    def contribute(
        self,
        stage: str,
        key: Any,
        write_part: Callable[[Workspace], None],
        is_whole: Callable[[Workspace], bool],
        finish: Callable[[Workspace], None],
    ) -> Artifact | None:
        """As in a folder, but no lock keeps two processes from ending an artifact together.

        One of them may then miss parts that the other has removed, and takes what the other makes.
        """
        try:
            return super().contribute(stage, key, write_part, is_whole, finish)
        except FileNotFoundError:
            if (artifact := self._finished_elsewhere(self.path(stage, key).name)) is None:
                raise
            return artifact

    def _finished_elsewhere(self, name: str) -> Artifact | None:
        """The artifact that another process is about to finish; None if it takes too long."""
        end = time.monotonic() + SECONDS_TO_FINISH
        while (artifact := self.named(name)) is None and time.monotonic() < end:
            time.sleep(0.1)
        return artifact

    def _finished(self, path: Path) -> Artifact:
        return RemoteArtifact(path, self._keeper)

    def files(self, name: str) -> Collection[str]:
        return self._keeper.journal(name)

    def _unfinished(self, path: Path) -> Artifact:
        path.mkdir(parents=True, exist_ok=True)
        return UnfinishedRemoteArtifact(path, self._keeper)

    def _workspace(self, path: Path, lock: BaseFileLock | None = None) -> Workspace:
        return RemoteWorkspace(path, self._keeper)


class RemoteArtifact(Artifact):
    """A finished artifact, whose tensors are fetched when they are read."""

    def __init__(self, path: Path, keeper: Keeper):
        super().__init__(path)
        self._keeper = keeper
        for name in self.manifest["files"]:
            if not name.endswith(TENSORS):
                self._bring(name)

    def file(self, name: str) -> Path:
        self._bring(name)
        return super().file(name)

    def _bring(self, name: str) -> None:
        if name in self and not (self.path / name).exists():
            _fetch(self._keeper, self.path.name, name, self.path)


class UnfinishedRemoteArtifact(RemoteArtifact):
    """What the keeper has of an artifact in the making."""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return {"files": self._keeper.journal(self.path.name), "seconds": 0.0}


class RemoteWorkspace(Workspace):
    """An artifact in the making, whose files and journal the keeper has. path: of the artifact in the own folder."""

    def __init__(self, path: Path, keeper: Keeper):
        self._artifact = path.name
        self._keeper = keeper
        super().__init__(partial_path(path), is_finished=lambda: keeper.manifest(path.name) is not None)

    def remove(self, name: str) -> None:
        self.flush()
        self._keeper.remove(self._artifact, name)
        self._coming.discard(name)
        self._read_journal()
        (self.path / name).unlink(missing_ok=True)

    def finish(self, destination: Path, key: Any) -> None:
        self.flush()
        self._keeper.finish(self._artifact, key, self._spent())
        manifest = self._keeper.manifest(self._artifact)
        assert manifest is not None, "the keeper has finished it, or another process has"
        for copy in self.path.iterdir():
            if copy.name not in manifest["files"]:
                shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
        write_json(self.path / MANIFEST, manifest)
        if destination.exists():
            shutil.rmtree(destination)
        self.path.rename(destination)

    def _enter(self, name: str, temporary: Path, recorded: str) -> None:
        content = np.fromfile(temporary, dtype=np.uint8)
        self._keeper.write(self._artifact, name, content, recorded, self._spent())
        temporary.replace(self.path / name)
        self._files[name] = recorded

    def _file(self, name: str) -> Path:
        if not (self.path / name).exists():
            _fetch(self._keeper, self._artifact, name, self.path)
            check_file(self.path / name, self._files[name], self.path)
        return self.path / name

    def check(self) -> None:
        """The keeper has compared them."""

    def _read_journal(self) -> None:
        self._files = self._keeper.journal(self._artifact)

    def _write_journal(self) -> None:
        """The keeper writes it."""


def _fetch(keeper: Keeper, artifact: str, file: str, folder: Path) -> None:
    content = keeper.read(artifact, file)
    arriving = folder / f".{file}.arriving"
    content.tofile(arriving)
    arriving.replace(folder / file)
