"""Atomic writes."""

from __future__ import annotations

import pytest

from lqer.store.files import write_text


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a.txt", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "new")]


def test_an_error_names_the_file_that_was_to_be_written_and_leaves_no_temporary_one(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        write_text(tmp_path / "a.txt", "new")
    assert refused.value.filename == str(tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
