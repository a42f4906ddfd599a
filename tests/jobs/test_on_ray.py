"""How jobs are handed out to workers, with a stand-in for Ray: rooms on nodes, workers that are lost and why."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lqer.config.cluster import ClusterConfig
from lqer.errors import ConfigError
from lqer.jobs.graph import Job, Schedule
from lqer.jobs.on_ray import SECONDS_BETWEEN_FILES, SECONDS_BETWEEN_LOOKS, Answer, Done, _connected, _Workers
from lqer.jobs.progress import shown
from lqer.store.records import JOURNAL
from lqer.store.store import Store, partial_path
from lqer.store.workspace import Workspace

# As Ray 2.60 says it, shortened.
OUT_OF_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node was 7GB used / 8GB
OOM kill reason: Memory usage exceeded threshold
Object store memory usage: 0%"""
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: Worker
\tpid: 7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Some common causes include: (1)"""
WITHOUT_PACKAGE = """The actor died because of an error raised in its creation task, ray::Worker.__init__()
  File "here.py", line 1
ModuleNotFoundError: No module named 'lqer'"""


class StandIn:
    """What `_Workers` asks of Ray. ends: of a job, how its calls end, before one that does the job."""

    def __init__(self, resources: Mapping[str, float], ends: Mapping[str, list[Any]] | None = None):
        exceptions = pytest.importorskip("ray.exceptions")
        self.exceptions = exceptions
        self.ends = {name: list(of_job) for name, of_job in (ends or {}).items()}
        self.resources = resources
        self.options: list[dict[str, Any]] = []
        self.most_busy = 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "node", "Alive": True, "Resources": self.resources}]

    def remote(self, kind: type) -> Any:
        def worker(*arguments: Any) -> Any:
            # A reference is the name of the job.
            work = SimpleNamespace(remote=lambda name, text: name)
            return SimpleNamespace(work=work, __ray_terminate__=SimpleNamespace(remote=lambda: "end"))

        def with_options(**options: Any) -> Any:
            self.options.append(options)
            return SimpleNamespace(remote=worker)

        return SimpleNamespace(options=with_options)

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        self.most_busy = max(self.most_busy, len(references))
        return references[:num_returns], references[num_returns:]

    def get(self, name: str) -> Done:
        end = self.ends[name].pop(0) if self.ends.get(name) else Answer(None, [])
        if isinstance(end, Exception):
            raise end
        return Done(end, "node", "vm/1", 0.1)


def cluster_of(**settings: Any) -> ClusterConfig:
    return ClusterConfig(address="auto", store="shared", **settings)


def work_through(ray: StandIn, cluster: ClusterConfig, *jobs: Job | str, store: Store | None = None) -> Schedule:
    """jobs: those that need no other one by their names."""
    schedule = Schedule([Job(job, (), (), lambda store: None) if isinstance(job, str) else job for job in jobs])
    store, texts = store or Store(Path("nowhere")), dict.fromkeys(schedule.jobs, "")
    with shown(schedule) as bars:
        _Workers(ray, schedule, texts, lambda *told: Answer(None, []), cluster, store).work_through(bars)
    return schedule


def losses() -> dict[str, tuple[Any, str]]:
    """How a worker can be lost, and what the line says of it."""
    exceptions = pytest.importorskip("ray.exceptions")
    gang = "quantize: process 2 of 2 was killed by SIGKILL"
    return {
        "killed": (
            exceptions.RayActorError(error_msg=KILLED), "The actor is dead because its worker process has died"
        ),
        "the node's memory": (
            exceptions.OutOfMemoryError(OUT_OF_MEMORY),
            "1 worker(s) were killed due to the node running low on memory",
        ),
        "no lqer on the node": (
            exceptions.RayActorError(error_msg=WITHOUT_PACKAGE), "ModuleNotFoundError: No module named 'lqer'"
        ),
        "a process of its gang": (Answer(None, [], lost=gang), gang),
    }  # fmt: skip


LOSSES = ("killed", "the node's memory", "no lqer on the node", "a process of its gang")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_job_whose_worker_is_lost_is_done_again(loss, caplog):
    caplog.set_level("INFO", logger="lqer")
    end, reason = losses()[loss]
    ray = StandIn({"CPU": 2}, {"quantize-1": [end]})
    schedule = work_through(ray, cluster_of(cpus_per_job=1), "quantize-1", "quantize-2")
    assert schedule.done == {"quantize-1", "quantize-2"}
    assert f"quantize-1: its worker was lost; done again (1 of 3): {reason}\n" in caplog.text


@pytest.mark.parametrize("loss", LOSSES)
def test_a_job_that_loses_its_worker_each_time_fails_with_the_reason(loss):
    end, reason = losses()[loss]
    ray = StandIn({"CPU": 2}, {"quantize-1": [end, end]})
    cluster = cluster_of(cpus_per_job=1, retries=1)
    schedule = work_through(ray, cluster, "quantize-1", "quantize-2")
    assert schedule.done == {"quantize-2"}
    assert schedule.failed == {
        "quantize-1": f"quantize-1: its worker was lost 2 times (cluster.retries 1), at last: {reason}; if memory runs "
        "out, raise cluster.gpus_per_job or cluster.cpus_per_job"
    }


def test_a_job_that_fails_is_not_done_again(caplog):
    caplog.set_level("INFO", logger="lqer")
    ray = StandIn({"CPU": 1}, {"quantize-1": [Answer("a file is damaged", [])]})
    schedule = work_through(ray, cluster_of(cpus_per_job=1), "quantize-1")
    assert schedule.failed == {"quantize-1": "a file is damaged"}
    assert "done again" not in caplog.text


class Calibrating(StandIn):
    """In which "calibrate-1" writes a file each time that it is waited for, and ends when nothing else is done."""

    def __init__(self, store: Store, ends: Mapping[str, list[Any]] | None = None):
        super().__init__({"CPU": 2}, ends)
        self.workspace = Workspace(partial_path(store.root / "calibrate-1"))
        self.ended: list[str] = []

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        if "calibrate-1" in references:
            assert timeout == (SECONDS_BETWEEN_FILES if len(self.workspace.names()) < 2 else SECONDS_BETWEEN_LOOKS)
        others = [one for one in references if one != "calibrate-1"]
        if not others and len(self.workspace.names()) < 2:
            self.workspace.write_json(f"block-{len(self.workspace.names())}", [])
            return [], references
        return (others or references)[:1], []

    def get(self, name: str) -> Done:
        done = super().get(name)
        self.ended.append(name)
        return done


def of_two_parts() -> list[Job]:
    parts = [
        Job(f"part {index}", (), ("calibrate-1",), lambda store: None, enough={"calibrate-1": (f"block-{index}",)})
        for index in range(2)
    ]
    return [Job("calibrate-1", (), (), lambda store: None), *parts]


@pytest.mark.parametrize("lost", [False, True])
def test_a_part_starts_while_the_job_that_makes_the_rest_of_what_it_reads_goes_on(tmp_path, lost, caplog):
    caplog.set_level("INFO", logger="lqer")
    store = Store(tmp_path)
    ray = Calibrating(store, {"part 0": [Answer(None, [], lost="killed")]} if lost else None)
    schedule = work_through(ray, cluster_of(cpus_per_job=1), *of_two_parts(), store=store)
    assert ray.ended == [*["part 0"] * (1 + lost), "part 1", "calibrate-1"]
    assert schedule.done == {"calibrate-1", "part 0", "part 1"}
    assert ("part 0: its worker was lost; done again (1 of 3): killed" in caplog.text) == lost


class Meanwhile(Calibrating):
    """In which all statistics are there once the first text is done, and "calibrate-1" ends last."""

    def __init__(self, store: Store, cpus: int):
        super().__init__(store)
        self.resources = {"CPU": cpus}

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        self.most_busy = max(self.most_busy, len(references))
        if "text 1" in references:
            for index in range(2):
                self.workspace.write_json(f"block-{index}", [])
        return [one for one in references if one != "calibrate-1"][:1] or references[:1], []


@pytest.mark.parametrize(
    ("cpus", "order"),
    [
        (2, ["text 1", "text 2", "text 3", "part 0", "part 1", "calibrate-1"]),
        # A third worker, which has no model yet.
        (3, ["text 1", "part 0", "text 2", "part 1", "text 3", "calibrate-1"]),
    ],
)
def test_a_worker_with_a_model_in_memory_does_not_leave_it_for_a_part_while_others_come(tmp_path, cpus, order):
    store, model = Store(tmp_path), SimpleNamespace(release=lambda: None)
    texts = [Job(f"text {index}", (), (), lambda store: None, model=model) for index in (1, 2, 3)]
    ray = Meanwhile(store, cpus)
    calibrate, *parts = of_two_parts()
    # The first text alone can start with the statistics.
    texts[1:] = [replace(text, needs=("text 1",)) for text in texts[1:]]
    work_through(ray, cluster_of(cpus_per_job=1), calibrate, *parts, *texts, store=store)
    assert ray.ended == order
    assert len(ray.options) == cpus


def test_a_part_that_waits_for_nothing_more_goes_before_a_model_in_memory(tmp_path):
    model = SimpleNamespace(release=lambda: None)
    texts = [Job(f"text {index}", (), (), lambda store: None, model=model) for index in (1, 2)]
    texts[1] = replace(texts[1], needs=("text 1",))
    part = Job("part", (), ("text 1",), lambda store: None, seconds=9.0)
    ray = Calibrating(Store(tmp_path))
    ray.resources = {"CPU": 1}
    work_through(ray, cluster_of(cpus_per_job=1), *texts, part)
    assert ray.ended == ["text 1", "part", "text 2"]


def test_a_damaged_record_of_what_there_is_ends_nothing(tmp_path):
    """The jobs that read it say so; those of other runs go on."""
    (tmp_path / "calibrate-1.partial").mkdir()
    (tmp_path / "calibrate-1.partial" / JOURNAL).write_text("[")
    ray = StandIn({"CPU": 1}, {"calibrate-1": [Answer("journal.json is damaged", [])]})
    schedule = work_through(ray, cluster_of(cpus_per_job=1), *of_two_parts(), "another run", store=Store(tmp_path))
    assert schedule.failed == dict.fromkeys(("calibrate-1", "part 0", "part 1"), "journal.json is damaged")
    assert schedule.done == {"another run"}


@pytest.mark.parametrize(
    ("resources", "settings", "workers"),
    [
        ({"CPU": 8, "GPU": 2}, {}, 2),
        ({"CPU": 8, "GPU": 4}, {"gpus_per_job": 2}, 2),
        # What is left of two cards is no worker's.
        ({"CPU": 8, "GPU": 2}, {"gpus_per_job": 0.4}, 4),
        ({"CPU": 8, "GPU": 1}, {"gpus_per_job": 0.1}, 10),
        ({"CPU": 8, "GPU": 1}, {"gpus_per_job": 1 / 3}, 3),
        # Workers with a GPU wait for no CPU.
        ({"CPU": 2, "GPU": 2}, {"gpus_per_job": 0.25}, 8),
        ({"CPU": 9}, {"cpus_per_job": 4}, 2),
    ],
)
def test_no_more_workers_are_started_than_nodes_have_room_for(resources, settings, workers):
    ray = StandIn(resources)
    work_through(ray, cluster_of(**settings), *map(str, range(30)))
    assert ray.most_busy == len(ray.options) == workers
    reserved = sum(options["num_cpus"] for options in ray.options)
    assert reserved <= resources["CPU"]


def test_more_gpus_than_any_node_has_are_refused():
    with pytest.raises(ConfigError, match=r"cluster\.gpus_per_job 3: no node has more than 2 GPUs"):
        work_through(StandIn({"CPU": 8, "GPU": 2}), cluster_of(gpus_per_job=3), "quantize-1")


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "127.0.0.1:port"])
def test_an_address_where_no_cluster_answers_is_refused_at_once(address):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])
    with pytest.raises(ConfigError, match=rf"cluster\.address '{address}': no cluster answers there \("):
        _connected(ClusterConfig(address=address))


def test_a_cluster_of_another_version_is_refused_with_both(monkeypatch):
    ray = pytest.importorskip("ray")

    def init(**options: Any) -> None:
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.52\nThis process:\n    Ray: 2.60"
        )

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=r"'auto': Version mismatch: .* with: Ray: 2\.52 This process: Ray: 2\.60$"):
        _connected(ClusterConfig(address="auto"))
