"""A store behind a keeper: the bytes of a store in a folder, resumed, shared and refused like it."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3

from lqer.errors import StoreError
from lqer.store.keeper import Keeper
from lqer.store.records import JOURNAL, MANIFEST
from lqer.store.remote import RemoteStore
from lqer.store.store import Store, Workspace, partial_path

KEY = {"version": 1}
CONTENT = np.zeros(3, dtype=np.uint8)
HASH = blake3(CONTENT).hexdigest()
NAMES = [f"block-{index}.safetensors" for index in range(4)]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def keeper(kept: Path) -> Keeper:
    return Keeper(kept)


def tensors(name: str) -> dict[str, torch.Tensor]:
    return {"x": torch.full((4,), float(NAMES.index(name)))}


def write(workspace: Workspace, names: list[str]) -> None:
    for name in names:
        if name not in workspace:
            workspace.write_tensors(name, tensors(name))


def build(workspace: Workspace) -> None:
    with workspace.writing_behind(1 << 20):
        write(workspace, NAMES)
        workspace.write_json("about.json", {"read": workspace.tensors(NAMES[0])["x"].tolist()})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def test_what_a_remote_store_builds_is_what_a_store_builds(tmp_path, kept, keeper):
    remote = RemoteStore(tmp_path / "own", keeper)
    made = remote.obtain("stage", KEY, build)
    alone = Store(tmp_path / "alone").obtain("stage", KEY, build)
    there = Store(kept).find("stage", KEY)
    assert files(there.path) == files(alone.path)
    assert {**there.manifest, "seconds": 0} == {**alone.manifest, "seconds": 0}
    assert made.json("about.json") == {"read": [0.0] * 4}
    assert not list(kept.glob("*.partial"))


def test_files_are_fetched_when_they_are_read(tmp_path, kept, keeper):
    Store(kept).obtain("stage", KEY, build)
    found = RemoteStore(tmp_path / "own", keeper).find("stage", KEY)
    assert sorted(path.name for path in found.path.iterdir()) == ["about.json", MANIFEST]
    assert torch.equal(found.tensors(NAMES[2])["x"], tensors(NAMES[2])["x"])
    assert not (found.path / NAMES[1]).exists()
    found.verify()
    assert files(found.path) == files(Store(kept).find("stage", KEY).path)


def test_an_artifact_that_is_not_there_is_not_found(tmp_path, keeper):
    assert RemoteStore(tmp_path / "own", keeper).find("stage", KEY) is None


def test_another_machine_goes_on_where_one_was_lost(tmp_path, keeper, kept):
    def lost(workspace: Workspace) -> None:
        write(workspace, NAMES[:2])
        raise KeyboardInterrupt

    def rest(workspace: Workspace) -> None:
        assert workspace.names() == NAMES[:2]
        assert torch.equal(workspace.tensors(NAMES[1])["x"], tensors(NAMES[1])["x"])
        build(workspace)

    with pytest.raises(KeyboardInterrupt):
        RemoteStore(tmp_path / "first", keeper).obtain("stage", KEY, lost)
    # The keeper may be another one as well: its journal is on disk.
    RemoteStore(tmp_path / "second", Keeper(kept)).obtain("stage", KEY, rest)
    alone = Store(tmp_path / "alone").obtain("stage", KEY, build)
    assert files(Store(kept).find("stage", KEY).path) == files(alone.path)


def test_parts_of_several_machines_make_one_artifact(tmp_path, keeper, kept):
    def contribute(part: int) -> None:
        RemoteStore(tmp_path / f"own-{part}", keeper).contribute(
            "stage",
            KEY,
            write_part=lambda workspace: write(workspace, NAMES[part::2]),
            is_whole=lambda workspace: all(name in workspace for name in NAMES),
            finish=lambda workspace: workspace.write_json("about.json", workspace.names()),
        )

    with ThreadPoolExecutor(2) as machines:
        list(machines.map(contribute, range(2)))
    made = Store(kept).find("stage", KEY)
    made.verify()
    assert made.json("about.json") == NAMES


def test_two_machines_that_end_an_artifact_together_get_the_same_one(tmp_path, keeper, kept):
    """Both have found every part; each removes the parts, and reads them before that."""
    both_have_all = threading.Barrier(2)

    def finish(workspace: Workspace) -> None:
        both_have_all.wait(timeout=30)
        found = {name: workspace.tensors(name)["x"].tolist() for name in NAMES}
        workspace.write_json("about.json", found)
        for name in NAMES:
            workspace.remove(name)

    def contribute(machine: int) -> object:
        return RemoteStore(tmp_path / f"own-{machine}", keeper).contribute(
            "stage",
            KEY,
            write_part=lambda workspace: write(workspace, NAMES),
            is_whole=lambda workspace: all(name in workspace for name in NAMES),
            finish=finish,
        )

    with ThreadPoolExecutor(2) as machines:
        found = list(machines.map(contribute, range(2)))
    made = Store(kept).find("stage", KEY)
    made.verify()
    assert [artifact.manifest for artifact in found] == [made.manifest] * 2
    assert list(made.manifest["files"]) == ["about.json"]


def test_a_machine_that_reads_parts_after_the_end_of_the_artifact_gets_it(tmp_path, keeper, kept):
    """Both have found every part; the other one is done before this one begins."""

    def finish(workspace: Workspace) -> None:
        workspace.write_json("about.json", {name: workspace.tensors(name)["x"].tolist() for name in NAMES})
        for name in NAMES:
            workspace.remove(name)

    def finish_late(workspace: Workspace) -> None:
        contribute(1, finish)
        finish(workspace)

    def contribute(part: int, finish):
        return RemoteStore(tmp_path / f"own-{part}", keeper).contribute(
            "stage",
            KEY,
            write_part=lambda workspace: write(workspace, NAMES[part::2]),
            is_whole=lambda workspace: all(name in workspace for name in NAMES),
            finish=finish,
        )

    assert contribute(1, finish) is None
    found = contribute(0, finish_late)
    made = Store(kept).find("stage", KEY)
    made.verify()
    assert found.manifest == made.manifest
    assert list(made.manifest["files"]) == ["about.json"]


def test_an_artifact_that_is_finished_after_the_look_for_it_gets_no_other_folder(tmp_path, keeper, kept, monkeypatch):
    named = Store.named

    def finished_after_the_look(store: Store, name: str):
        found = named(store, name)
        monkeypatch.undo()
        RemoteStore(tmp_path / "other", keeper).obtain("stage", KEY, build)
        return found

    monkeypatch.setattr(Store, "named", finished_after_the_look)
    assert set(keeper.journal(Store.name_of("stage", KEY))) == {*NAMES, "about.json"}
    assert not list(kept.glob("*.partial"))


def test_a_removed_file_is_gone_on_both_sides(tmp_path, keeper, kept):
    def with_a_passing_file(workspace: Workspace) -> None:
        workspace.write_json("passing.json", {})
        workspace.remove("passing.json")
        assert "passing.json" not in workspace
        build(workspace)

    RemoteStore(tmp_path / "own", keeper).obtain("stage", KEY, with_a_passing_file)
    assert "passing.json" not in Store(kept).find("stage", KEY).manifest["files"]


def test_build_times_of_all_machines_are_summed(tmp_path, keeper, kept):
    keeper.journal("stage-1")
    for index in range(3):
        keeper.write("stage-1", f"{index}.json", CONTENT, HASH, seconds=2.0)
    keeper.finish("stage-1", KEY, seconds=1.5)
    assert json.loads((kept / "stage-1" / MANIFEST).read_text())["seconds"] == 7.5


@pytest.mark.parametrize(
    "call",
    [
        lambda keeper, name: keeper.write(name, NAMES[0], CONTENT, HASH, 1.0),
        lambda keeper, name: keeper.remove(name, NAMES[0]),
        lambda keeper, name: keeper.finish(name, KEY, 1.0),
    ],
    ids=["write", "remove", "finish"],
)
def test_what_arrives_after_the_end_changes_nothing(tmp_path, keeper, kept, call):
    made = RemoteStore(tmp_path / "own", keeper).obtain("stage", KEY, build)
    before = files(kept / made.path.name)
    call(keeper, made.path.name)
    assert files(kept / made.path.name) == before
    assert not partial_path(kept / made.path.name).exists()


def begin(keeper: Keeper, folder: Path) -> None:
    """Another machine makes two files, and is lost."""

    def lost(workspace: Workspace) -> None:
        write(workspace, NAMES[:2])
        workspace.write_json("about-0.json", [0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RemoteStore(folder, keeper).obtain("stage", KEY, lost)


def test_files_of_an_unfinished_artifact_are_read_and_no_others(tmp_path, keeper):
    begin(keeper, tmp_path / "first")
    store, name = RemoteStore(tmp_path / "second", keeper), Store.name_of("stage", KEY)
    assert set(store.files(name)) == {*NAMES[:2], "about-0.json"}
    assert store.provide("stage", KEY, NAMES[:2], build) is None
    found = store.read(name, lambda artifact: (artifact.tensors(NAMES[1])["x"], artifact.json("about-0.json")))
    assert torch.equal(found[0], tensors(NAMES[1])["x"])
    assert found[1] == [0]
    with pytest.raises(StoreError, match=rf"{NAMES[2]} is missing"):
        store.read(name, lambda artifact: artifact.tensors(NAMES[2]))
    # Nothing of it passes for the finished one, neither now nor later.
    assert store.find("stage", KEY) is None
    RemoteStore(tmp_path / "third", keeper).obtain("stage", KEY, build)
    made = store.find("stage", KEY)
    made.verify()
    assert torch.equal(made.tensors(NAMES[3])["x"], tensors(NAMES[3])["x"])


def test_an_artifact_whose_first_files_were_read_is_finished_by_the_same_machine(tmp_path, keeper, kept):
    begin(keeper, tmp_path / "first")
    store = RemoteStore(tmp_path / "second", keeper)
    store.read(Store.name_of("stage", KEY), lambda artifact: artifact.tensors(NAMES[0]))
    store.obtain("stage", KEY, build).verify()
    assert sorted(Store(kept).find("stage", KEY).manifest["files"]) == ["about-0.json", "about.json", *NAMES]


def test_an_artifact_that_is_finished_while_it_is_read_is_read_where_it_is_then(tmp_path, keeper):
    begin(keeper, tmp_path / "first")
    reads = []

    def read(artifact):
        if not reads:
            RemoteStore(tmp_path / "third", keeper).obtain("stage", KEY, build)
        reads.append(artifact)
        return artifact.tensors(NAMES[1])["x"]

    found = RemoteStore(tmp_path / "second", keeper).read(Store.name_of("stage", KEY), read)
    assert torch.equal(found, tensors(NAMES[1])["x"])


class TestDamage:
    def flip(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    def test_of_a_finished_file_is_refused_where_it_is_read(self, tmp_path, keeper, kept):
        made = Store(kept).obtain("stage", KEY, build)
        self.flip(made.path / NAMES[0])
        with pytest.raises(StoreError, match=rf"{made.path}/block-0\.safetensors is damaged"):
            RemoteStore(tmp_path / "own", keeper).find("stage", KEY).tensors(NAMES[0])

    def test_of_an_unfinished_file_is_refused_before_work(self, tmp_path, keeper, kept):
        path = Store(kept).path("stage", KEY)
        write(Workspace(partial_path(path)), NAMES[:1])
        self.flip(partial_path(path) / NAMES[0])
        with pytest.raises(StoreError, match=r"block-0\.safetensors is damaged"):
            RemoteStore(tmp_path / "own", keeper).obtain("stage", KEY, build)

    def test_of_an_unfinished_file_is_refused_where_it_is_read(self, tmp_path, keeper, kept):
        begin(keeper, tmp_path / "first")
        self.flip(partial_path(Store(kept).path("stage", KEY)) / NAMES[0])
        store, name = RemoteStore(tmp_path / "second", keeper), Store.name_of("stage", KEY)
        with pytest.raises(StoreError, match=r"block-0\.safetensors is damaged"):
            store.read(name, lambda artifact: artifact.tensors(NAMES[0]))

    def test_of_a_journal_is_refused_by_name(self, tmp_path, keeper, kept):
        path = partial_path(Store(kept).path("stage", KEY))
        path.mkdir(parents=True)
        (path / JOURNAL).write_text("[")
        with pytest.raises(StoreError, match=r"journal\.json is damaged"):
            RemoteStore(tmp_path / "own", keeper).obtain("stage", KEY, build)

    def test_on_the_way_to_the_keeper_is_refused(self, keeper, kept):
        with pytest.raises(StoreError, match=r"stage-1/0\.json was damaged in transfer"):
            keeper.write("stage-1", "0.json", CONTENT + 1, HASH, 1.0)
        assert keeper.journal("stage-1") == {}
