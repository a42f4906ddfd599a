"""Artifacts are whole or not there, survive a kill file by file, and are refused when damaged."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lqer.errors import StoreError
from lqer.store import workspace as workspace_module
from lqer.store.files import content_hash
from lqer.store.store import JOURNAL, MANIFEST, Store, Workspace

KEY = {"model": "m", "rank": 4}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make(workspace: Workspace) -> None:
    for index in range(3):
        name = f"block-{index}.safetensors"
        if name not in workspace:
            workspace.write_tensors(name, {"b": torch.full((4,), index), "a": torch.arange(3.0)})
    workspace.write_json("about.json", {"blocks": 3})


def kill_after(files: int):
    def make_some(workspace: Workspace) -> None:
        for index in range(files):
            workspace.write_tensors(
                f"block-{index}.safetensors", {"b": torch.full((4,), index), "a": torch.arange(3.0)}
            )
        raise Killed

    return make_some


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def test_what_was_written_is_read_back(store):
    artifact = store.obtain("stage", KEY, make)
    assert artifact.json("about.json") == {"blocks": 3}
    assert torch.equal(artifact.tensors("block-2.safetensors")["b"], torch.full((4,), 2))


def test_a_finished_artifact_is_not_made_again(store):
    first = store.obtain("stage", KEY, make)
    again = store.obtain("stage", KEY, lambda workspace: pytest.fail("made twice"))
    assert again.path == first.path
    assert again.content == first.content


def test_stage_and_key_decide_the_name_and_the_order_of_keys_does_not(store):
    assert store.path("stage", KEY) == store.path("stage", dict(reversed(KEY.items())))
    assert store.path("stage", KEY) != store.path("other", KEY)
    assert store.path("stage", KEY) != store.path("stage", KEY | {"rank": 5})
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})


def test_the_content_does_not_depend_on_when_or_under_which_key_it_was_made(store):
    assert store.obtain("stage", KEY, make).content == store.obtain("stage", {"other": 1}, make).content


@pytest.mark.parametrize("files", [0, 1, 2, 3])
def test_a_killed_build_goes_on_with_the_files_it_had(store, tmp_path, files):
    whole = Store(tmp_path / "whole").obtain("stage", KEY, make)
    with pytest.raises(Killed):
        store.obtain("stage", KEY, kill_after(files))
    assert store.find("stage", KEY) is None

    written = []
    resumed = store.obtain("stage", KEY, lambda workspace: make(Recording(workspace, written)))
    assert len(written) == 3 - files + 1
    assert bytes_of(resumed.path) == bytes_of(whole.path)


class Recording:
    """A workspace that notes what is written to it."""

    def __init__(self, workspace: Workspace, written: list[str]):
        self._workspace, self._written = workspace, written

    def __contains__(self, name: str) -> bool:
        return name in self._workspace

    def write_tensors(self, name, tensors):
        self._written.append(name)
        self._workspace.write_tensors(name, tensors)

    def write_json(self, name, value):
        self._written.append(name)
        self._workspace.write_json(name, value)


def test_a_file_written_but_not_yet_journalled_is_written_again(store, monkeypatch):
    monkeypatch.setattr("lqer.store.workspace.write_json", lambda path, value: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        store.obtain("stage", KEY, make)
    monkeypatch.undo()
    partial = store.path("stage", KEY).with_name(f"{store.path('stage', KEY).name}.partial")
    assert (partial / "block-0.safetensors").exists()
    assert not (partial / JOURNAL).exists()
    assert store.obtain("stage", KEY, make).json("about.json") == {"blocks": 3}


def test_what_a_kill_left_half_written_is_not_part_of_the_artifact(store):
    with pytest.raises(Killed):
        store.obtain("stage", KEY, kill_after(1))
    partial = next(store.root.glob("*.partial"))
    (partial / ".block-1.safetensors.12345").write_bytes(b"half")
    artifact = store.obtain("stage", KEY, make)
    assert sorted(path.name for path in artifact.path.iterdir()) == sorted([MANIFEST, *artifact.manifest["files"]])


def test_a_kill_before_the_artifact_gets_its_name_costs_nothing(store, monkeypatch):
    def refuse(self, target):
        if target == store.path("stage", KEY):
            raise Killed
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(Killed):
        store.obtain("stage", KEY, make)
    monkeypatch.undo()
    written = []
    artifact = store.obtain("stage", KEY, lambda workspace: make(Recording(workspace, written)))
    assert written == ["about.json"]
    assert sorted(path.name for path in artifact.path.iterdir()) == sorted([MANIFEST, *artifact.manifest["files"]])


def test_a_kill_after_the_artifact_got_its_name_leaves_a_journal_that_the_next_look_removes(store):
    artifact = store.obtain("stage", 1, lambda workspace: workspace.write_json("a.json", 1))
    (artifact.path / JOURNAL).write_text("{}")
    assert store.find("stage", 1).json("a.json") == 1
    assert not (artifact.path / JOURNAL).exists()


def test_seconds_add_up_over_the_processes_that_had_a_part_in_it(store):
    def slow_then_killed(workspace):
        time.sleep(0.3)
        kill_after(1)(workspace)

    with pytest.raises(Killed):
        store.obtain("stage", KEY, slow_then_killed)
    assert store.obtain("stage", KEY, make).seconds >= 0.3


class TestDamage:
    def flip(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    def test_a_changed_file_is_refused_by_name(self, store):
        artifact = store.obtain("stage", KEY, make)
        self.flip(artifact.path / "block-1.safetensors")
        found = store.obtain("stage", KEY, make)
        assert torch.equal(found.tensors("block-0.safetensors")["a"], torch.arange(3.0))
        with pytest.raises(StoreError, match=r"block-1\.safetensors is damaged .* remove .* to rebuild it"):
            found.tensors("block-1.safetensors")
        with pytest.raises(StoreError, match=r"block-1\.safetensors is damaged"):
            found.verify()

    def test_a_missing_file_is_refused_by_name(self, store):
        artifact = store.obtain("stage", KEY, make)
        (artifact.path / "about.json").unlink()
        with pytest.raises(StoreError, match=r"about\.json is missing"):
            store.obtain("stage", KEY, make).json("about.json")

    def test_a_damaged_manifest_is_refused_by_name(self, store):
        artifact = store.obtain("stage", KEY, make)
        (artifact.path / MANIFEST).write_text("{")
        with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
            _ = store.obtain("stage", KEY, make).content

    @pytest.mark.parametrize("content", ["{}", "[]", '{"files": []}', '{"files": {}, "seconds": "soon"}'])
    def test_a_manifest_without_its_entries_is_refused_by_name(self, store, content):
        artifact = store.obtain("stage", KEY, make)
        (artifact.path / MANIFEST).write_text(content)
        with pytest.raises(
            StoreError, match=r'manifest\.json is damaged \(no valid entry "\w+"\); remove .* to rebuild it'
        ):
            store.obtain("stage", KEY, make)

    def test_an_artifact_without_its_manifest_is_refused_by_name(self, store):
        artifact = store.obtain("stage", KEY, make)
        (artifact.path / MANIFEST).unlink()
        with pytest.raises(StoreError, match=r"manifest\.json is missing; remove .* to rebuild it"):
            store.obtain("stage", KEY, make)

    def test_a_folder_in_place_of_the_manifest_is_refused_by_name(self, store):
        artifact = store.obtain("stage", KEY, make)
        (artifact.path / MANIFEST).unlink()
        (artifact.path / MANIFEST).mkdir()
        with pytest.raises(StoreError, match=r"manifest\.json is damaged .*Is a directory"):
            store.obtain("stage", KEY, make)

    def test_a_file_that_the_manifest_does_not_list_is_refused_by_name(self, store):
        artifact = store.obtain("stage", KEY, make)
        (artifact.path / "more.safetensors").write_bytes(b"")
        with pytest.raises(StoreError, match=r"more\.safetensors is not in the manifest"):
            artifact.verify()

    def test_a_refused_write_names_the_file(self, store, monkeypatch):
        def refuse(descriptor):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        monkeypatch.setattr("lqer.store.files.os.fsync", refuse)
        with pytest.raises(OSError, match="Disk quota exceeded") as refused:
            store.obtain("stage", KEY, make)
        assert str(store.root) in refused.value.filename

    def test_a_kill_while_a_file_is_written_again_leaves_no_damage(self, store, monkeypatch):
        def write_twice(workspace: Workspace) -> None:
            if "about.json" not in workspace:
                workspace.write_json("about.json", {"epoch": 1})
            monkeypatch.setattr("lqer.store.workspace.hash_file", lambda path: (_ for _ in ()).throw(Killed))
            workspace.write_json("about.json", {"epoch": 2})

        with pytest.raises(Killed):
            store.obtain("stage", KEY, write_twice)
        monkeypatch.undo()
        assert store.obtain("stage", KEY, make).json("about.json") == {"blocks": 3}

    def test_a_file_of_an_interrupted_build_is_refused_by_name(self, store):
        with pytest.raises(Killed):
            store.obtain("stage", KEY, kill_after(2))
        self.flip(next(store.root.glob("*.partial")) / "block-0.safetensors")
        with pytest.raises(StoreError, match=r"block-0\.safetensors is damaged"):
            store.obtain("stage", KEY, make)

    def test_of_several_processes_each_compares_what_it_reads_and_the_last_one_all(self, store, monkeypatch):
        def contribute(write_part, finish=lambda workspace: None):
            return store.contribute("stage", KEY, write_part, lambda workspace: "last.json" in workspace, finish)

        def write(*names: str):
            return lambda workspace: [workspace.write_json(name, name) for name in names]

        compared: list[str] = []
        checked = workspace_module.check_file
        monkeypatch.setattr(
            workspace_module, "check_file", lambda path, *rest: (compared.append(path.name), checked(path, *rest))
        )
        contribute(write("first.json", "second.json"))
        contribute(lambda workspace: workspace.json("second.json"))
        assert compared == ["second.json"]
        self.flip(next(store.root.glob("*.partial")) / "first.json")
        contribute(write("third.json"))
        with pytest.raises(StoreError, match=r"first\.json is damaged"):
            contribute(lambda workspace: workspace.json("first.json"))
        finished: list[Workspace] = []
        with pytest.raises(StoreError, match=r"first\.json is damaged"):
            contribute(write("last.json"), finished.append)
        assert not finished

    def test_a_damaged_journal_is_refused_by_name(self, store):
        with pytest.raises(Killed):
            store.obtain("stage", KEY, kill_after(2))
        (next(store.root.glob("*.partial")) / JOURNAL).write_text("[")
        with pytest.raises(StoreError, match=r"journal\.json is damaged"):
            store.obtain("stage", KEY, make)


def _obtain_slowly(root: Path, makers: Path) -> None:
    def make_slowly(workspace: Workspace) -> None:
        with makers.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        workspace.write_json("about.json", {"blocks": 3})

    assert Store(root).obtain("stage", KEY, make_slowly).json("about.json") == {"blocks": 3}


def test_of_several_processes_one_makes_the_artifact_and_the_others_wait(tmp_path):
    makers = tmp_path / "makers.txt"
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_obtain_slowly, args=(tmp_path / "store", makers)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(makers.read_text().split()) == 1


class TestUnfinished:
    """What another process has made of an artifact, while it makes the rest."""

    FIRST, SECOND, THIRD = (f"block-{index}.safetensors" for index in range(3))

    @pytest.fixture
    def building(self, store) -> Iterator[threading.Event]:
        """Another user of the store that has made the first two files, and goes on once the event is set."""
        has_two, go_on = threading.Event(), threading.Event()

        def make_slowly(workspace: Workspace) -> None:
            for index in range(2):
                workspace.write_tensors(f"block-{index}.safetensors", {"b": torch.full((4,), index)})
            has_two.set()
            assert go_on.wait(30)
            make(workspace)

        maker = threading.Thread(target=lambda: Store(store.root).obtain("stage", KEY, make_slowly), daemon=True)
        maker.start()
        assert has_two.wait(30)
        yield go_on
        go_on.set()
        maker.join(30)
        assert not maker.is_alive()

    def second(self, store: Store) -> list[int]:
        name = Store.name_of("stage", KEY)
        return store.read(name, lambda artifact: artifact.tensors(self.SECOND)["b"].tolist())

    def test_can_be_listed_and_read(self, store, building):
        assert set(store.files(Store.name_of("stage", KEY))) == {self.FIRST, self.SECOND}
        assert self.second(store) == [1] * 4
        assert store.find("stage", KEY) is None

    def test_is_provided_without_a_wait_for_the_rest(self, store, building):
        assert store.provide("stage", KEY, [self.SECOND], make) is None
        assert not building.is_set()

    def test_is_waited_for_until_the_files_are_there(self, store, building):
        said = []

        def say(line: str) -> None:
            said.append(line)
            building.set()

        waiting = Store(store.root, say)
        assert waiting.provide("stage", KEY, [self.THIRD], make) is None
        assert building.is_set()
        assert len(said) == 1
        assert said[0].startswith("waiting for another process that builds stage-")

    def test_lacks_what_is_not_there_yet(self, store, building):
        with pytest.raises(StoreError, match=rf"{self.THIRD} is missing"):
            store.read(Store.name_of("stage", KEY), lambda artifact: artifact.tensors(self.THIRD))

    def test_is_read_where_it_is_once_it_is_finished(self, store):
        """The folder is renamed between the look for it and the read."""
        with pytest.raises(Killed):
            store.obtain("stage", KEY, kill_after(2))
        reads = []

        def read(artifact) -> list[int]:
            if not reads:
                store.obtain("stage", KEY, make)
            reads.append(artifact.path.name)
            return artifact.tensors(self.SECOND)["b"].tolist()

        name = Store.name_of("stage", KEY)
        assert store.read(name, read) == [1] * 4
        assert reads == [f"{name}.partial", name]

    def test_is_built_here_where_no_other_process_is_at_it(self, store):
        with pytest.raises(Killed):
            store.obtain("stage", KEY, kill_after(2))
        assert store.provide("stage", KEY, [self.SECOND], make) is None
        assert store.find("stage", KEY) is None
        built = store.provide("stage", KEY, [self.THIRD], make)
        assert built.manifest == store.find("stage", KEY).manifest
        assert store.provide("stage", KEY, [self.THIRD], make) is None

    def test_is_refused_by_name_where_it_is_damaged(self, store):
        with pytest.raises(Killed):
            store.obtain("stage", KEY, kill_after(2))
        damaged = next(store.root.glob(f"*.partial/{self.SECOND}"))
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        with pytest.raises(StoreError, match=rf"{damaged} is damaged.*; remove {damaged.parent} to rebuild it"):
            self.second(store)

    def test_has_no_files_where_there_is_none(self, store):
        assert set(store.files("stage-1")) == set()
        assert not store.root.exists()
