"""Files written behind the work: in order, bounded, with errors in the thread that works, the same bytes, killable."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from lqer.store import workspace as workspace_module
from lqer.store.records import JOURNAL
from lqer.store.store import Store, Workspace
from lqer.store.writer import Writer

PLENTY = 1 << 30


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "artifact.partial")


def test_jobs_run_one_after_another_in_another_thread():
    done: list[tuple[int, str]] = []
    writer = Writer(PLENTY)
    for number in range(5):
        writer.submit(lambda number=number: done.append((number, threading.current_thread().name)), 1)
    writer.wait()
    writer.close()
    assert [number for number, _ in done] == [*range(5)]
    assert {name for _, name in done} == {"write-behind_0"}


def test_the_bytes_that_wait_are_bounded():
    held, most = [0], [0]
    lock = threading.Lock()

    def job(size: int) -> None:
        time.sleep(0.01)
        with lock:
            held[0] -= size

    writer = Writer(100)
    for size in (40, 60, 30, 250, 90):
        with lock:
            held[0] += size
        writer.submit(lambda size=size: job(size), size)
        most[0] = max(most[0], held[0])
        if size > 100:
            assert held[0] == 0
    writer.close()
    assert most[0] <= 100


def hand_in_until_refused(writer: Writer, ran: list[int]) -> None:
    for number in range(1000):
        writer.submit(lambda number=number: ran.append(number), 0)
        time.sleep(0.01)


def test_after_a_job_that_fails_none_is_run_and_every_call_says_why():
    ran: list[int] = []

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "block.safetensors")

    writer = Writer(PLENTY)
    writer.submit(fail, 0)
    # The thread of the first job may not have begun yet.
    with pytest.raises(OSError, match="No space left"):
        hand_in_until_refused(writer, ran)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.close()
    assert ran == []


def write_blocks(workspace: Workspace, count: int = 6) -> None:
    for index in range(count):
        if f"block-{index}.safetensors" not in workspace:
            workspace.write_json(f"layers-{index}.json", [{"index": index}])
            workspace.write_tensors(f"block-{index}.safetensors", {"x": torch.full((1000,), index), "a": torch.ones(3)})


def make_behind(workspace: Workspace) -> None:
    with workspace.writing_behind(PLENTY):
        write_blocks(workspace)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_an_artifact_has_the_same_bytes_as_one_that_is_not_written_behind(tmp_path):
    behind = Store(tmp_path / "behind").obtain("stage", 1, make_behind)
    ahead = Store(tmp_path / "ahead").obtain("stage", 1, write_blocks)
    assert bytes_of(behind.path) == bytes_of(ahead.path)
    assert behind.manifest["files"] == ahead.manifest["files"]


def test_what_was_handed_over_counts_as_written_and_is_there_for_whoever_reads_it(workspace):
    with workspace.writing_behind(PLENTY):
        workspace.write_tensors("a.safetensors", {"x": torch.arange(4)})
        assert "a.safetensors" in workspace
        assert torch.equal(workspace.tensors("a.safetensors")["x"], torch.arange(4))
        workspace.write_json("b.json", 1)
        assert workspace.names() == ["a.safetensors", "b.json"]
        workspace.remove("a.safetensors")
        assert "a.safetensors" not in workspace
    assert workspace.names() == ["b.json"]
    assert not (workspace.path / "a.safetensors").exists()


def test_a_value_is_written_as_it_was_when_it_was_handed_over(workspace):
    hold = threading.Event()
    with workspace.writing_behind(PLENTY):
        workspace.write("first", lambda path: (hold.wait(), path.touch()))
        rows = [1]
        workspace.write_json("rows.json", rows)
        rows.append(2)
        hold.set()
    assert workspace.json("rows.json") == [1]


def test_an_error_of_the_thread_ends_the_work_and_names_the_file(workspace, monkeypatch):
    def refuse(path: Path) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("lqer.store.files.fsync", refuse)
    with pytest.raises(OSError, match="Disk quota exceeded") as refused:
        make_behind(workspace)
    assert refused.value.filename.endswith("layers-0.json")
    assert not (workspace.path / JOURNAL).exists()


def test_what_was_handed_over_before_the_work_failed_is_written(workspace):
    def fail() -> None:
        with workspace.writing_behind(PLENTY):
            write_blocks(workspace, 3)
            raise KilledError

    with pytest.raises(KilledError):
        fail()
    assert len(Workspace(workspace.path).names()) == 6


@pytest.mark.parametrize("after", [0, 1, 2, 5, 11])
def test_a_kill_in_the_middle_of_a_write_resumes_to_the_same_bytes(tmp_path, monkeypatch, after):
    whole = Store(tmp_path / "whole").obtain("stage", 1, make_behind)
    written: list[str] = []
    original = Workspace._enter

    def enter(self: Workspace, name: str, temporary: Path, recorded: str) -> None:
        if len(written) == after:
            raise KilledError
        written.append(name)
        original(self, name, temporary, recorded)

    monkeypatch.setattr(Workspace, "_enter", enter)
    killed = Store(tmp_path / "killed")
    with pytest.raises(KilledError):
        killed.obtain("stage", 1, make_behind)
    assert len(written) == after
    monkeypatch.undo()
    assert Workspace(next(killed.root.glob("*.partial"))).names() == sorted(written)
    assert bytes_of(killed.obtain("stage", 1, make_behind).path) == bytes_of(whole.path)


def test_the_lock_is_free_while_a_file_is_written_and_hashed(tmp_path, monkeypatch):
    """Two processes that build parts of one artifact do not wait for each other's disk."""
    store, seen = Store(tmp_path / "store"), []
    held = tmp_path / "store" / f".{store.path('stage', 1).name}.lock"

    def is_free() -> bool:
        try:
            with FileLock(held, timeout=0, is_singleton=False):
                return True
        except Timeout:
            return False

    def write_part(workspace: Workspace) -> None:
        with workspace.writing_behind(PLENTY):
            workspace.write("a.bin", lambda path: (seen.append(is_free()), path.write_bytes(b"a")))

    original = workspace_module.hash_file
    monkeypatch.setattr(workspace_module, "hash_file", lambda path: (seen.append(is_free()), original(path))[1])
    made = store.contribute("stage", 1, write_part, lambda workspace: "a.bin" in workspace, lambda workspace: None)
    assert made is not None
    assert seen == [True, True]


def test_a_write_that_another_process_finishes_the_artifact_under_is_left_to_it(tmp_path):
    """It removes what is unfinished before it renames the folder, and holds the lock from one to the other."""
    folder, finished = tmp_path / "artifact.partial", []

    class Guard(nullcontext):
        def __enter__(self) -> None:
            finished.append(True)

    def swept_away(path: Path) -> None:
        path.write_bytes(b"a")
        path.unlink()

    Workspace(folder, Guard(), lambda: bool(finished)).write("a.bin", swept_away)
    assert list(folder.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"a\.bin"):
        Workspace(folder).write("a.bin", swept_away)


def test_a_file_of_tensors_that_are_found_when_it_is_written_is_that_of_the_same_tensors(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2, dtype=torch.bfloat16)}
    thread: list[threading.Thread] = []

    def find() -> dict[str, torch.Tensor]:
        thread.append(threading.current_thread())
        return tensors

    workspace = Workspace(tmp_path)
    with workspace.writing_behind(1 << 20):
        workspace.write_tensors("now", tensors)
        workspace.write_found("found", find)
    assert (tmp_path / "now").read_bytes() == (tmp_path / "found").read_bytes()
    assert thread[0] is not threading.main_thread()
