"""Folders of processes: there as long as their process is."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

from lqer.store.own import OwnFolder


@pytest.fixture(autouse=True)
def under(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_gone_once_it_is_closed(under):
    own = OwnFolder()
    for name in ("store/artifact/file", "store/kept"):
        (own.path / name).parent.mkdir(parents=True, exist_ok=True)
        (own.path / name).write_text("text")
    own.clear(but="kept")
    assert [path.name for path in own.path.rglob("*")] == ["store", "kept"]
    own.close()
    assert not list(under.iterdir())


def test_two_processes_have_two_folders(under):
    first, second = OwnFolder(), OwnFolder()
    assert first.path != second.path
    assert first.path.is_dir()


def test_what_a_killed_process_left_is_removed_by_the_next_one(under):
    program = (
        f"import os, tempfile; tempfile.tempdir = {str(under)!r}\n"
        "from lqer.store.own import OwnFolder\n"
        "print(OwnFolder().path, flush=True); os.kill(os.getpid(), 9)"
    )
    left = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stdout.strip()
    assert left
    assert left in map(str, under.iterdir())
    own = OwnFolder()
    assert left not in map(str, under.iterdir())
    assert own.path.is_dir()
