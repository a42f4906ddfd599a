"""Whether locks of a folder exclude anybody: processes that share a store rely on it."""

from __future__ import annotations

import errno
from contextlib import suppress
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
    remedy = f"set {key} to a folder on a file system with locks (flock)"
    try:
        with FileLock(lock_file):
            second = FileLock(lock_file)
            second.acquire(timeout=0)
            second.release()
    except Timeout:
        return
    except NotImplementedError as error:
        raise StoreError(f"{folder} is on a file system without locks ({error}): {remedy}") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            # Nobody knows the lock file.
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise StoreError(f"{folder} is on a file system without locks ({error.strerror}): {remedy}") from None
    finally:
        with suppress(OSError):
            lock_file.unlink(missing_ok=True)
    raise StoreError(f"{folder} is on a file system whose locks exclude nobody: {remedy}")
