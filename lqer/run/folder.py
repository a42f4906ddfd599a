"""The folder of a run, <output_dir>/<tag>: the resolved configuration, the log, and a link to the checkpoint.

Nothing is written before the run has been checked, and only into a folder that is new or that an earlier run made. Runs
with one tag and the same settings follow each other; with other settings at the same time, the second is refused.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

import tomli_w
from filelock import FileLock, Timeout

from lqer.config import Config
from lqer.config.rules import STORE_FOLDER
from lqer.errors import RunFolderError
from lqer.results import RESULTS_FILE
from lqer.store.files import content_hash, write_text
from lqer.store.locks import check_locks, is_held
from lqer.store.names import CHECKPOINT_LINK

CONFIG_FILE = "config.toml"
LOG_FILE = "run.log"
# Marks a folder as a run's; locks of its processes carry a hash of their settings.
MARKER = ".lqer-run"
LOCKS = ".lock-*"

log = logging.getLogger(__name__)


def store_path(config: Config) -> Path:
    """Where the artifacts of a configuration are."""
    return Path(config.output_dir) / STORE_FOLDER


def run_folder(config: Config) -> Path:
    """Where the run writes. Raises RunFolderError for a folder that a run may not write into."""
    folder = Path(config.output_dir) / config.tag
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder: choose another tag or output_dir")
    # In this order: a run that is just beginning creates the marker before any other file.
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise RunFolderError(f"{folder} was not made by a run and is not empty: choose another tag or output_dir")
    link = folder / CHECKPOINT_LINK
    if link.exists() and not link.is_symlink():
        raise RunFolderError(f"{link} is not a link to an artifact: move it away")
    return folder


@contextmanager
def locked(folder: Path, config: Config, part: str = "") -> Iterator[None]:
    """Hold the folder for one process. part: names the chunk of a run that several processes share.

    A run with the same settings is waited for. Raises RunFolderError while one with other settings is in progress, and
    StoreError where no lock keeps anybody out.
    """
    check_locks(Path(config.output_dir), "output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    settings = content_hash(config.model_dump(mode="json"))[:16]
    lock = FileLock(folder / f".lock-{settings}{part}")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that runs tag %r with the same settings", config.tag)
        lock.acquire()
    try:
        for other in sorted(folder.glob(LOCKS)):
            if not other.name.startswith(f".lock-{settings}") and is_held(other):
                raise RunFolderError(f"tag {config.tag!r}: another process runs it with other settings under {folder}")
        yield
    finally:
        lock.release()


def begin_run(folder: Path, config: Config) -> None:
    """Write the configuration, and remove the results of an earlier run."""
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    write_text(folder / CONFIG_FILE, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


class _LogFile(logging.FileHandler):
    """A log on a full disk loses lines; the run then fails at its next artifact, with a line of its own."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class RunLog:
    """Collects the log of a run in memory until its folder may be written to, then in the folder's run.log."""

    def __init__(self) -> None:
        self._buffer = MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1)
        self.path: Path | None = None

    def __enter__(self) -> RunLog:
        logging.getLogger().addHandler(self._buffer)
        logging.getLogger("lqer").setLevel(logging.INFO)
        return self

    def write_to(self, folder: Path) -> None:
        """Append everything logged so far, and from now on, to the folder's run.log."""
        handler = _LogFile(folder / LOG_FILE, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._buffer.setTarget(handler)
        self._buffer.flush()
        self._buffer.capacity = 1
        self.path = folder / LOG_FILE

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if isinstance(error, Exception):
            # To the file only, with its traceback: the command line prints its own line.
            record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (error,), sys.exc_info())
            self._buffer.handle(record)
        logging.getLogger().removeHandler(self._buffer)
        target = self._buffer.target
        self._buffer.close()
        if target is not None:
            # On a broken disk the error that ended the run is the one to report.
            with suppress(OSError):
                target.close()


def link_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Link the artifact, replacing the link of an earlier run with this tag."""
    link = folder / CHECKPOINT_LINK
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..") / checkpoint.relative_to(folder.parent))
