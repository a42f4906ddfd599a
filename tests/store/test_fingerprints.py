"""A hash is remembered while size, time and inode of its file are what they were, and not a moment longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from blake3 import blake3

from lqer.store import fingerprints
from lqer.store.fingerprints import Fingerprints

LONG_AGO = 10**18


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write(path, b"weights")
    return path


def write(path: Path, content: bytes, changed: int = LONG_AGO) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(changed, changed))


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of files that are hashed, not remembered."""
    names: list[str] = []
    original = fingerprints.hash_file

    def noted(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(fingerprints, "hash_file", noted)
    return names


def remember(record: Path, file: Path) -> str:
    known = Fingerprints(record)
    (digest,) = known.of([file])
    known.save()
    return digest


def test_a_file_is_hashed_once_over_all_processes(file, tmp_path, hashed):
    first = remember(tmp_path / "record.json", file)
    assert first == blake3(b"weights").hexdigest()
    assert remember(tmp_path / "record.json", file) == first
    assert hashed == [file.name]
    assert Fingerprints().of([file]) == [first]
    assert hashed == [file.name] * 2


def test_a_change_of_the_size_is_seen(file, tmp_path):
    remember(tmp_path / "record.json", file)
    write(file, b"other weights")
    assert remember(tmp_path / "record.json", file) == blake3(b"other weights").hexdigest()


def test_a_change_of_the_time_is_seen(file, tmp_path):
    remember(tmp_path / "record.json", file)
    write(file, b"WEIGHTS", LONG_AGO + 1)
    assert remember(tmp_path / "record.json", file) == blake3(b"WEIGHTS").hexdigest()


def test_another_file_in_its_place_is_seen(file, tmp_path):
    remember(tmp_path / "record.json", file)
    write(tmp_path / "other", b"WEIGHTS")
    (tmp_path / "other").replace(file)
    assert remember(tmp_path / "record.json", file) == blake3(b"WEIGHTS").hexdigest()


def test_a_file_that_has_just_changed_is_not_remembered(file, tmp_path, hashed):
    write(file, b"weights", time.time_ns())
    remember(tmp_path / "record.json", file)
    remember(tmp_path / "record.json", file)
    assert hashed == [file.name] * 2
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": [[1, 2], "b"]}'])
def test_a_damaged_record_costs_the_time_to_hash(file, tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    assert remember(tmp_path / "record.json", file) == blake3(b"weights").hexdigest()


def test_a_file_that_cannot_be_read_is_named(file, tmp_path):
    with pytest.raises(OSError, match=r"missing\.bin"):
        Fingerprints().of([file, tmp_path / "missing.bin"])


def test_what_was_begun_is_not_hashed_again(file, tmp_path, hashed):
    Fingerprints().begin([file])
    assert Fingerprints(tmp_path / "record.json").of([file]) == [blake3(b"weights").hexdigest()]
    assert hashed == [file.name]


def test_nothing_is_begun_that_is_remembered_or_that_has_just_changed(file, tmp_path, hashed):
    remember(tmp_path / "record.json", file)
    write(tmp_path / "new.safetensors", b"other weights", time.time_ns())
    Fingerprints(tmp_path / "record.json").begin([file, tmp_path / "new.safetensors", tmp_path / "missing.safetensors"])
    assert hashed == [file.name]


def test_a_change_after_hashing_was_begun_is_seen(file):
    Fingerprints().begin([file])
    write(file, b"WEIGHTS", LONG_AGO + 1)
    assert Fingerprints().of([file]) == [blake3(b"WEIGHTS").hexdigest()]


def test_a_file_that_could_not_be_hashed_when_it_was_begun_is_named_by_who_asks(file, monkeypatch):
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fingerprints, "hash_file", fail)
    Fingerprints().begin([file])
    with pytest.raises(OSError, match=f"Input/output error: .*{file.name}"):
        Fingerprints().of([file])
