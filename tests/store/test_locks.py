"""A folder is refused where locks keep nobody out, with the key that chooses another."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from lqer.errors import StoreError
from lqer.store import locks
from lqer.store.locks import check_held, check_locks


class OpenToAll(nullcontext):
    """A lock that everybody gets."""

    def acquire(self, timeout: float) -> None:
        pass

    def release(self) -> None:
        pass


def refusing(error: Exception):
    """A constructor of locks that a file system refuses."""

    class Refused(OpenToAll):
        def __enter__(self) -> None:
            raise error

    return Refused


def test_a_folder_with_locks_is_created_and_left_empty(tmp_path):
    check_locks(tmp_path / "new" / "folder", "output_dir")
    check_locks(tmp_path / "new" / "folder", "output_dir")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_locks_that_exclude_nobody_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "FileLock", OpenToAll)
    with pytest.raises(StoreError, match="locks exclude nobody: set output_dir to a folder on"):
        check_locks(tmp_path, "output_dir")


def test_a_lock_that_another_process_holds_keeps_this_one_out(tmp_path, monkeypatch):
    with locks.FileLock(tmp_path / "mark"):
        check_held(tmp_path / "mark", "output_dir")
        # As on a node that mounts the folder with locks of its own.
        monkeypatch.setattr(locks, "FileLock", OpenToAll)
        with pytest.raises(StoreError, match="locks do not exclude other nodes: set output_dir to a folder on"):
            check_held(tmp_path / "mark", "output_dir")


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), NotImplementedError("No flock")])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, error):
    monkeypatch.setattr(locks, "FileLock", refusing(error))
    with pytest.raises(StoreError, match=r"without locks \(No .*\): set output_dir") as refused:
        check_locks(tmp_path, "output_dir")
    assert str(tmp_path) in str(refused.value)


def test_a_full_disk_is_not_a_disk_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "FileLock", refusing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left") as refused:
        check_locks(tmp_path, "output_dir")
    assert Path(refused.value.filename) == tmp_path
