"""An artifact that another process finishes while this one is at a part of it: what comes late leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lqer.store.records import MANIFEST
from lqer.store.store import Artifact, Store, Workspace

KEY = {"model": "m"}
FIRST, SECOND, PASSING = "first.json", "second.json", "passing.json"


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def remove_passing(workspace: Workspace) -> None:
    for name in workspace.names():
        if name == PASSING:
            workspace.remove(name)


def contribute(
    root: Path, write_part: Callable[[Workspace], None], finish: Callable[[Workspace], None] = remove_passing
) -> Artifact | None:
    """Another process each time; the artifact is whole with its two files."""
    return Store(root).contribute(
        "stage", KEY, write_part, lambda workspace: FIRST in workspace and SECOND in workspace, finish
    )


def end(root: Path) -> None:
    """The process that has the second file finds the first, and finishes the artifact."""
    assert contribute(root, lambda workspace: workspace.write_json(SECOND, 2)) is not None


def assert_untouched(store: Store) -> None:
    """The artifact is what `end` made, and nothing is beside it but its lock."""
    artifact = store.find("stage", KEY)
    assert sorted(path.name for path in artifact.path.iterdir()) == [FIRST, MANIFEST, SECOND]
    assert [artifact.json(FIRST), artifact.json(SECOND)] == [1, 2]
    assert [path for path in store.root.iterdir() if path.is_dir()] == [artifact.path]


def begin(workspace: Workspace) -> None:
    workspace.write_json(PASSING, 0)
    workspace.write_json(FIRST, 1)


@pytest.mark.parametrize(
    "late",
    [
        remove_passing,
        lambda workspace: workspace.write_json(FIRST, "late"),
        lambda workspace: workspace.write_tensors("late.safetensors", {"x": torch.zeros(2)}),
    ],
    ids=["removes a file", "writes json", "writes tensors"],
)
def test_who_comes_after_its_end_gets_it_and_leaves_nothing(store, late):
    def write_part(workspace: Workspace) -> None:
        begin(workspace)
        end(store.root)
        late(workspace)

    assert contribute(store.root, write_part).path == store.path("stage", KEY)
    assert_untouched(store)


def test_what_is_written_while_the_folder_gets_its_name_is_not_in_it(store, monkeypatch):
    """A file comes between the look for strays and the new name, which its writer does not know."""
    rename, temporary = Path.rename, ".late.safetensors.tmp"

    def come_late(self: Path, target: Path) -> Path:
        if target == store.path("stage", KEY):
            (self / temporary).write_bytes(b"half")
        return rename(self, target)

    contribute(store.root, begin)
    monkeypatch.setattr(Path, "rename", come_late)
    end(store.root)
    store.find("stage", KEY).verify()
    assert_untouched(store)


def test_strays_that_their_writers_remove_meanwhile_are_no_failure(store, monkeypatch):
    names, iterdir = [".one.tmp", ".two.tmp"], Path.iterdir

    def look(self: Path):
        found = list(iterdir(self))
        for name in names:
            (self / name).unlink(missing_ok=True)
        return iter(found)

    def write_part(workspace: Workspace) -> None:
        begin(workspace)
        for name in names:
            (workspace.path / name).write_bytes(b"half")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "iterdir", look)
            end(store.root)

    contribute(store.root, write_part)
    assert_untouched(store)


def test_a_file_that_another_process_has_removed_before_it_was_killed_is_removed(store):
    def killed(workspace: Workspace) -> None:
        remove_passing(workspace)
        raise KilledError

    def write_part(workspace: Workspace) -> None:
        begin(workspace)
        with pytest.raises(KilledError):
            contribute(store.root, lambda other: other.write_json(SECOND, 2), killed)
        remove_passing(workspace)
        assert workspace.names() == [FIRST, SECOND]

    assert contribute(store.root, write_part) is not None
    assert_untouched(store)


def test_who_reads_what_another_process_has_removed_begins_again_with_what_that_has_made(store):
    calls: list[list[str]] = []

    def write_part(workspace: Workspace) -> None:
        calls.append(workspace.names())
        if FIRST not in workspace:
            if len(calls) == 1:
                contribute(store.root, make_first)
            make_first(workspace)

    def make_first(workspace: Workspace) -> None:
        assert workspace.json(PASSING) == 0
        workspace.write_json(FIRST, 1)
        workspace.remove(PASSING)

    contribute(store.root, lambda workspace: workspace.write_json(PASSING, 0))
    assert contribute(store.root, write_part) is None
    assert calls == [[PASSING], [FIRST]]
    end(store.root)
    assert_untouched(store)


def test_who_reads_it_after_the_end_gets_the_artifact(store):
    def write_part(workspace: Workspace) -> None:
        begin(workspace)
        end(store.root)
        workspace.json(PASSING)

    assert contribute(store.root, write_part).path == store.path("stage", KEY)
    assert_untouched(store)


def test_a_file_that_is_gone_though_nobody_has_removed_it_is_missed_by_name(store):
    def write_part(workspace: Workspace) -> None:
        begin(workspace)
        (workspace.path / PASSING).unlink()
        workspace.json(PASSING)

    with pytest.raises(FileNotFoundError, match=PASSING):
        contribute(store.root, write_part)


def test_a_write_that_the_system_refuses_is_told_where_nobody_has_finished_it(store):
    def write_part(workspace: Workspace) -> None:
        begin(workspace)
        workspace.write("third.json", lambda temporary: (temporary.parent / "nowhere" / "third").touch())

    with pytest.raises(FileNotFoundError, match="nowhere"):
        contribute(store.root, write_part)
