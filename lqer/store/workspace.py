"""An artifact in the making: files are entered into a journal one by one, so that a kill costs the one it hits."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqer.phases import phase
from lqer.store.files import fsync, hash_file, json_text, move_into_place, write_json, written_beside
from lqer.store.records import JOURNAL, MANIFEST, check_file, read_record
from lqer.store.writer import Writer


class Workspace:
    """An artifact being built; journalled files survive a kill.

    Several processes may write to one folder. Each writes and hashes a file beside its place, then moves it there and
    enters it into the journal under `guard`, the artifact's lock. Once `is_finished` says that another process has
    finished the artifact, writes and removals do nothing.

    What is there already is compared with its hashes at once. Of several processes, each would compare what all others
    have made: there each compares what it reads, and who ends the artifact compares all (`check`).
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
        # The hashes of files that were written here, or have been compared.
        self._known: dict[str, str] = {}
        self._seconds = 0.0
        self._since = time.monotonic()
        self._writer: Writer | None = None
        # Files that the writer has been given.
        self._coming: set[str] = set()
        self._read_journal()
        if guard is None:
            self.check()

    @contextmanager
    def writing_behind(self, most_waiting: int) -> Iterator[None]:
        """Within, `write` returns before the file is there: a thread writes one after another, in their order.

        most_waiting: bytes of memory that may wait to be written, see lqer/store/writer.py.
        An error of the thread is raised by the next call, or at the end. Whatever ends the work within, files that were
        handed over before it are written.
        """
        self._writer = Writer(most_waiting)
        try:
            yield
            self.flush()
        finally:
            self._writer.close()
            self._writer = None
            self._coming.clear()

    def flush(self) -> None:
        """Wait until every file is written and in the journal."""
        if self._writer is not None:
            self._writer.wait()

    def refresh(self) -> None:
        """Read the journal again: other processes may have written files."""
        self.flush()
        self._read_journal()

    def has_lost_files(self) -> bool:
        """Read the journal again. Returns whether another process has removed files meanwhile."""
        before = set(self.names())
        self.refresh()
        return not before <= self._files.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._coming or name in self._files

    def names(self) -> list[str]:
        """The files written so far, sorted."""
        self.flush()
        return sorted(self._files)

    def tensors(self, name: str) -> dict[str, Tensor]:
        self.flush()
        return load_file(self._file(name))

    def json(self, name: str) -> Any:
        self.flush()
        return json.loads(self._file(name).read_text(encoding="utf-8"))

    def check(self) -> None:
        """Compare every file with the journal. Raises StoreError."""
        for name in self._files:
            self._compare(name)

    def _file(self, name: str) -> Path:
        """Where a file that is written can be read. Raises StoreError if it was changed."""
        if name in self._files:
            self._compare(name)
        return self.path / name

    def _compare(self, name: str) -> None:
        recorded = self._files[name]
        if self._known.get(name) != recorded:
            check_file(self.path / name, recorded, self.path)
            self._known[name] = recorded

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of any device as safetensors, sorted by name, so that equal tensors give equal bytes.

        Where files are written behind the work, tensors of a GPU are copied now, and those of the CPU must not change.
        """
        with phase("write"):
            ready, wait_for_copies = _on_host(tensors)

        def save(temporary: Path) -> None:
            wait_for_copies()
            self._save(name, ready, temporary)

        self.write(name, save, sum(tensor.nbytes for tensor in ready.values()))

    def write_found(self, name: str, find: Callable[[], Mapping[str, Tensor]]) -> None:
        """The same of tensors that are found only when they are written, which may be in another thread."""

        def save(temporary: Path) -> None:
            self._save(name, find(), temporary)

        self.write(name, save)

    def _save(self, name: str, tensors: Mapping[str, Tensor], temporary: Path) -> None:
        try:
            save_file({key: tensors[key] for key in sorted(tensors)}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            # The library wraps the system's refusal of a write, such as that of a full disk.
            raise OSError(errno.EIO, str(error), str(self.path / name)) from error

    def write_json(self, name: str, value: Any) -> None:
        text = json_text(value)
        self.write(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def write(self, name: str, write: Callable[[Path], object], size: int = 0) -> None:
        """Let `write` create the file; size: bytes of memory that it holds until then."""
        if self._writer is None:
            self._write(name, write)
            return
        self._writer.submit(partial(self._write, name, write), size)
        self._coming.add(name)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        path = self.path / name
        try:
            with phase("write"), written_beside(path, write) as temporary:
                with phase("hash"):
                    recorded = hash_file(temporary)
                with self._guard:
                    if not self._is_finished():
                        self._enter(name, temporary, recorded)
        except OSError:
            # Whoever finishes the artifact removes what is unfinished and renames the folder, under its lock. Not every
            # library says of a file that it was not found.
            with self._guard:
                if not self._is_finished():
                    raise

    def _enter(self, name: str, temporary: Path, recorded: str) -> None:
        """Give a written file its name and enter it into the journal."""
        self._read_journal()
        if self._files.pop(name, None) is not None:
            # Before the file changes: a kill in between must not leave it unlike its entry.
            self._write_journal()
        move_into_place(temporary, self.path / name)
        self._files[name] = self._known[name] = recorded
        self._write_journal()

    def remove(self, name: str) -> None:
        """Remove a file from the journal, then delete it; a kill in between leaves a stray, which `finish` deletes.

        Another process may have removed it already, or have finished the artifact.
        """
        self.flush()
        with self._guard:
            self._read_journal()
            self._files.pop(name, None)
            self._coming.discard(name)
            if not self._is_finished():
                self._write_journal()
                (self.path / name).unlink(missing_ok=True)

    def finish(self, destination: Path, key: Any) -> None:
        """Give the artifact its manifest and its final folder; files that are not in the journal are removed."""
        self._spend()
        manifest = {"key": key, "files": dict(sorted(self._files.items())), "seconds": round(self._seconds, 3)}
        write_json(self.path / MANIFEST, manifest)
        self._remove_strays(self.path)
        self.path.rename(destination)
        fsync(destination.parent)
        # What other processes have begun to write meanwhile; from now on they do not find the folder.
        self._remove_strays(destination)
        # After the rename, so that a kill before it can still resume.
        (destination / JOURNAL).unlink(missing_ok=True)

    def _remove_strays(self, folder: Path) -> None:
        for stray in folder.iterdir():
            if stray.name not in (MANIFEST, JOURNAL) and stray.name not in self._files:
                # Its own writer may remove it at the same time.
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink(missing_ok=True)

    def _read_journal(self) -> None:
        if (self.path / JOURNAL).exists():
            journal = read_record(self.path / JOURNAL, {"files": dict, "seconds": (int, float)})
            self._files, self._seconds = journal["files"], journal["seconds"]

    def _write_journal(self) -> None:
        self._spend()
        write_json(self.path / JOURNAL, {"files": self._files, "seconds": self._seconds})

    def _spend(self) -> None:
        """Add the time since the last file to the build time of all processes."""
        self._seconds += self._spent()

    def _spent(self) -> float:
        """Seconds since this was last asked."""
        now = time.monotonic()
        spent, self._since = now - self._since, now
        return spent


def _on_host(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The tensors on the CPU, sorted by name, and a function that waits until copies from GPUs have arrived."""
    # Without waiting for the GPU, a copy's memory is page-locked.
    ready = {key: tensors[key].detach().contiguous().to("cpu", non_blocking=True) for key in sorted(tensors)}
    gpus = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    copied = [torch.cuda.current_stream(gpu).record_event() for gpu in gpus]

    def wait() -> None:
        for event in copied:
            event.synchronize()

    return ready, wait
