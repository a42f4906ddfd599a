"""Whether a lock is held, and whether locks of a folder exclude anybody: processes that share a store rely on it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lqer.errors import StoreError
from lqer.store.files import beside

# How a file system says that it has no locks; a full disk or a folder of somebody else is not that.
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def check_locks(folder: Path, key: str) -> None:
    """Create the folder, and raise StoreError unless a lock in it keeps out whoever asks for it second.

    key: of the configuration, that names the folder. Locks that hold on this host alone pass: nothing on one host tells
    them apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = beside(folder / "locks")
    try:
        with _locks_of(folder, key), FileLock(lock_file):
            keeps_out = is_held(lock_file)
    finally:
        with suppress(OSError):
            lock_file.unlink(missing_ok=True)
    if not keeps_out:
        raise StoreError(f"{folder} is on a file system whose locks exclude nobody: {_remedy(key)}")


def check_held(lock_file: Path, key: str) -> None:
    """Raise StoreError unless a lock that another process holds, on this host or another, keeps this one out.

    key: of the configuration, that names the folder of the lock.
    """
    with _locks_of(lock_file.parent, key):
        keeps_out = is_held(lock_file)
    if not keeps_out:
        where = f"{lock_file.parent} is on a file system whose locks do not exclude other nodes"
        raise StoreError(f'{where}: {_remedy(key)} for all of them, or cluster.store to "driver"')


def _remedy(key: str) -> str:
    return f"set {key} to a folder on a file system with locks (flock)"


def is_held(lock_file: Path) -> bool:
    """Whether a lock on the file keeps out whoever asks for one now, as this process does."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@contextmanager
def _locks_of(folder: Path, key: str) -> Iterator[None]:
    """Raise StoreError where the file system says that it has no locks."""
    try:
        yield
    except NotImplementedError as error:
        raise StoreError(f"{folder} is on a file system without locks ({error}): {_remedy(key)}") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            # Nobody knows the lock file.
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise StoreError(f"{folder} is on a file system without locks ({error.strerror}): {_remedy(key)}") from None
