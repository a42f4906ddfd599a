"""Atomic writes, and hashes of files of any size."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
from blake3 import blake3

from lqer.store import files
from lqer.store.files import beside, hash_file, write_text


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a.txt", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "new")]


def test_an_error_names_the_file_that_was_to_be_written_and_leaves_no_temporary_one(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        write_text(tmp_path / "a.txt", "new")
    assert refused.value.filename == str(tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_temporary_names_of_equal_processes_of_two_containers_differ(tmp_path):
    """Host name and process id are the same there, so that only chance tells them apart."""
    names = {beside(tmp_path / "a.txt").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(f".a.txt.{socket.gethostname()[:40]}.{os.getpid()}.") for name in names)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
def test_the_hash_of_a_file_does_not_depend_on_the_threads_that_make_it(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "LARGE_BYTES", 100)
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "a.bin").write_bytes(content)
    assert hash_file(tmp_path / "a.bin") == blake3(content).hexdigest()


def test_a_forked_process_can_hash_what_takes_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE_BYTES", 1 << 20)
    (tmp_path / "a.bin").write_bytes(bytes(1 << 22))
    hash_file(tmp_path / "a.bin")
    forked = multiprocessing.get_context("fork").Process(target=hash_file, args=(tmp_path / "a.bin",))
    forked.start()
    forked.join(60)
    ended = forked.exitcode
    forked.kill()
    assert ended == 0
