"""The side of a store that processes without its folder talk to: files by name, as bytes.

A keeper lives on the machine that has the folder, and is the only one that writes to it; `lqer/store/remote.py` is the
other side. Calls may come from several threads. Only the bytes of safetensors and JSON files go through it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from lqer.errors import StoreError
from lqer.store.files import HASHING_THREADS
from lqer.store.store import Artifact, Store, partial_path
from lqer.store.workspace import Workspace

# The bytes of a file, as what carries them between processes holds them without a copy.
Bytes = NDArray[np.uint8]


class Keeper:
    """Reads and writes the artifacts of the store in the folder `root`. Raises StoreError for what is damaged."""

    def __init__(self, root: Path):
        self._store = Store(root)
        self._unfinished: dict[str, _Kept] = {}
        # Each knows which of its files it has compared.
        self._finished: dict[str, Artifact] = {}
        self._opening = threading.Lock()

    def manifest(self, artifact: str) -> dict[str, Any] | None:
        """The manifest of a finished artifact, else None."""
        found = self._store.named(artifact)
        return None if found is None else found.manifest

    def journal(self, artifact: str) -> dict[str, str]:
        """The hashes of the files that an artifact has, finished or not."""
        if (manifest := self.manifest(artifact)) is not None:
            return manifest["files"]
        if (kept := self._kept(artifact)) is None:
            # It was finished meanwhile.
            return self.journal(artifact)
        with self._store.locked(self._store.root / artifact):
            kept.refresh()
            return kept.hashes

    def read(self, artifact: str, file: str) -> Bytes:
        """A file of an artifact, finished or not; it is compared with its hash here, and again where it arrives.

        Raises FileNotFoundError for one that it does not have, such as a part that was removed before its end.
        """
        found = self._finished.get(artifact) or self._store.named(artifact)
        if found is None:
            return np.fromfile(partial_path(self._store.root / artifact) / file, dtype=np.uint8)
        self._finished.setdefault(artifact, found)
        return np.fromfile(found.file(file) if file in found else found.path / file, dtype=np.uint8)

    def write(self, artifact: str, file: str, content: Bytes, recorded: str, seconds: float) -> None:
        """Enter a file into an artifact, and the seconds of work that it took, unless it is finished.

        recorded: its hash where it was made.
        """
        if blake3(content.data, max_threads=HASHING_THREADS).hexdigest() != recorded:
            raise StoreError(f"{self._store.root / artifact / file} was damaged in transfer; run again")
        if (kept := self._kept(artifact)) is not None:
            kept.take(file, content, seconds)

    def remove(self, artifact: str, file: str) -> None:
        """Remove a file of an artifact, unless it is finished."""
        if (kept := self._kept(artifact)) is not None:
            kept.remove(file)

    def finish(self, artifact: str, key: Any, seconds: float) -> None:
        """Name the artifact after its key, unless another process has done so."""
        path = self._store.root / artifact
        if (kept := self._kept(artifact)) is None:
            return
        with self._store.locked(path):
            if self._store.named(artifact) is None:
                kept.refresh()
                kept.count(seconds)
                kept.finish(path, key)
        with self._opening:
            self._unfinished.pop(artifact, None)

    def _kept(self, artifact: str) -> _Kept | None:
        """An artifact in the making; None of a finished one, whose folder for that must not come back."""
        with self._opening:
            if artifact not in self._unfinished:
                path = self._store.root / artifact
                with self._store.locked(path) as lock:
                    if self._store.named(artifact) is not None:
                        return None
                    self._unfinished[artifact] = _Kept(
                        partial_path(path), lock, lambda: self._store.named(artifact) is not None
                    )
            return self._unfinished[artifact]


class _Kept(Workspace):
    """An artifact whose files others make: its build time is what they say."""

    def __init__(self, *arguments: Any):
        self._told = 0.0
        self._counting = threading.Lock()
        super().__init__(*arguments)
        self.check()

    @property
    def hashes(self) -> dict[str, str]:
        return dict(self._files)

    def take(self, name: str, content: Bytes, seconds: float) -> None:
        self.count(seconds)
        self.write(name, content.tofile)

    def count(self, seconds: float) -> None:
        with self._counting:
            self._told += seconds

    def _spent(self) -> float:
        with self._counting:
            told, self._told = self._told, 0.0
        return told
