"""The files of a checkpoint, held against its manifest as they are read.

The manifest is that of the artifact: it travels with a copy of the folder. It lists every file with its BLAKE3 hash.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lqer.errors import ModelError
from lqer.phases import in_phase
from lqer.store.files import content_hash, hash_file
from lqer.store.records import JOURNAL, MANIFEST

# Files that may be next to those of a checkpoint: nothing reads them.
HARMLESS = (".md",)


class Files(Protocol):
    """The files of a checkpoint as loading asks for them: those of a folder, or an artifact of the store."""

    path: Path

    def verify(self, except_for: Collection[str] = ()) -> None:
        """Raise LqerError, naming it, for a missing or an extra file, and for a changed one not in `except_for`."""

    def file(self, name: str) -> Path:
        """The path of a file. Raises LqerError if it is missing or its bytes are not those that were written."""


class CheckpointFiles:
    """The files of the checkpoint at `path`; with verify = False, whatever is there is taken."""

    def __init__(self, path: Path, verify: bool = True):
        self.path, self._verify = path, verify

    def verify(self, except_for: Collection[str] = ()) -> None:
        """Raise ModelError, naming it, for a missing or an extra file, and for a changed one not in `except_for`."""
        if not self._verify:
            return
        present = {file.name for file in self.path.iterdir() if not file.name.startswith(".")}
        extra = present - self._hashes.keys() - {MANIFEST, JOURNAL}
        for name in sorted(extra):
            if Path(name).suffix not in HARMLESS:
                raise ModelError(f"{self.path / name} is not a file of this checkpoint: remove it; {self._way_out}")
        for name in self._hashes:
            if not (self.path / name).is_file():
                raise ModelError(f"{self.path / name} is missing: copy the checkpoint again")
            if name not in except_for:
                self.file(name)

    @in_phase("verify")
    def file(self, name: str) -> Path:
        """The path of a file. Raises ModelError if it is missing or its bytes are not those that were written."""
        path = self.path / name
        if not path.is_file():
            raise ModelError(f"{path} is missing: copy the checkpoint again")
        if self._verify and hash_file(path) != self._hashes.get(name):
            raise ModelError(f"{path} is damaged (its hash is not that in {MANIFEST}): copy the checkpoint again")
        return path

    @property
    def content(self) -> str:
        """A hash of the contents of all files."""
        return content_hash(self._hashes)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        manifest = self.path / MANIFEST
        try:
            hashes = json.loads(manifest.read_text(encoding="utf-8"))["files"]
            return {str(name): str(recorded) for name, recorded in hashes.items()}
        except FileNotFoundError:
            raise ModelError(f"{manifest} is missing, so nothing can be verified; {self._way_out}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"{manifest} is damaged: copy the checkpoint again; {self._way_out}") from None

    @property
    def _way_out(self) -> str:
        return "load_quantized(..., verify=False) loads it as it is"
