"""Works through a schedule on the workers of a Ray cluster. The only file that imports ray, and only when it is called.

A worker is told the name of a job and a text that says what the job belongs to; it answers with one line if the job
failed. Nothing else travels: workers read the model and write artifacts themselves, in a folder that all nodes share.
A worker keeps what it has imported and read for the next job. If it is lost, its job is done again by another, up to
`retries` times; a job that failed is not.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from lqer.config.schema import ClusterConfig
from lqer.errors import ConfigError
from lqer.jobs.graph import Schedule

log = logging.getLogger(__name__)

LOCAL = "local"
# Only texts travel through Ray's own store.
LOCAL_STORE_BYTES = 100_000_000


class Answer(NamedTuple):
    """problem: the line of a job that failed. log: what the job logged."""

    problem: str | None
    log: list[str]


# Does a job in a worker: (name, text) -> its answer. A function of a module, since Ray sends it by its name.
Perform = Callable[[str, str], Answer]


class Worker:
    """In a process of its own, with the GPUs that Ray gives it."""

    def __init__(self, perform: Perform):
        self._perform = perform

    def work(self, name: str, text: str) -> tuple[Answer, str, float]:
        """The answer, the node and the seconds."""
        started = time.monotonic()
        answer = self._perform(name, text)
        return answer, platform.node(), time.monotonic() - started


def run_on_ray(schedule: Schedule, texts: Mapping[str, str], perform: Perform, cluster: ClusterConfig) -> None:
    """Do the jobs of `schedule`. texts: what a worker is told of each job, by name.

    Raises ConfigError if Ray is not installed or there is no such cluster. A KeyboardInterrupt ends all workers.
    """
    ray = _connected(cluster)
    try:
        _work_through(ray, schedule, texts, perform, cluster)
    finally:
        ray.shutdown()


def _connected(cluster: ClusterConfig) -> Any:
    # Before the import, which reads them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without GPUs, workers see what this process sees.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError('cluster.address: Ray is not installed (pip install "lqer[cluster]")') from None
    local = cluster.address == LOCAL
    # Bars of several workers cannot share a terminal; the jobs have one.
    environment = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(cluster.cpus_per_job)}
    try:
        ray.init(
            address=LOCAL if local else cluster.address,
            runtime_env={"env_vars": environment},
            include_dashboard=False if local else None,
            object_store_memory=LOCAL_STORE_BYTES if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"cluster.address {cluster.address!r}: {line}") from None
    return ray


def _work_through(
    ray: Any, schedule: Schedule, texts: Mapping[str, str], perform: Perform, cluster: ClusterConfig
) -> None:
    share = _share(ray, cluster)
    most = _workers(ray, share)
    log.info("%d jobs on up to %d workers of %s", len(schedule.jobs) - len(schedule.done), most, _shown(share))
    idle: list[Any] = []
    busy: dict[Any, tuple[str, Any]] = {}
    lost: Counter[str] = Counter()
    with tqdm(total=len(schedule.jobs), initial=len(schedule.done), desc="jobs", unit="job") as bar:
        while not schedule.is_over:
            for name in schedule.ready()[: most - len(busy)]:
                worker = idle.pop() if idle else ray.remote(Worker).options(**share).remote(perform)
                schedule.start(name)
                busy[worker.work.remote(name, texts[name])] = name, worker
            ended, _ = ray.wait(list(busy), num_returns=1)
            for reference in ended:
                name, worker = busy.pop(reference)
                try:
                    answer, node, seconds = ray.get(reference)
                except ray.exceptions.RayActorError:
                    lost[name] += 1
                    _after_loss(schedule, name, lost[name], cluster.retries)
                    continue
                idle.append(worker)
                for line in answer.log:
                    log.info("%s: %s", node, line)
                if answer.problem is None:
                    schedule.finish(name)
                    log.info("%s: %s in %.1f s", node, name, seconds)
                else:
                    schedule.fail(name, answer.problem)
            bar.update(len(schedule.done) + len(schedule.failed) - bar.n)


def _after_loss(schedule: Schedule, name: str, times: int, retries: int) -> None:
    if times > retries:
        schedule.fail(name, f"{name}: its worker was lost {times} times (cluster.retries {retries})")
    else:
        log.warning("warning: %s: its worker was lost; done again (%d of %d)", name, times, retries)
        schedule.again(name)


def _share(ray: Any, cluster: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for a worker. Raises ConfigError for more than any node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = max(node.get("GPU", 0) for node in nodes)
    if not gpus:
        return {"num_cpus": min(cluster.cpus_per_job, max(node.get("CPU", 1) for node in nodes))}
    if cluster.gpus_per_job > gpus:
        raise ConfigError(f"cluster.gpus_per_job {cluster.gpus_per_job:g}: no node has more than {gpus:g} GPUs")
    return {"num_cpus": 1, "num_gpus": cluster.gpus_per_job}


def _workers(ray: Any, share: Mapping[str, float]) -> int:
    """How many workers the cluster has room for."""
    kind, least = ("GPU", share["num_gpus"]) if "num_gpus" in share else ("CPU", share["num_cpus"])
    return sum(int(node["Resources"].get(kind, 0) // least) for node in ray.nodes() if node["Alive"])


def _shown(share: Mapping[str, float]) -> str:
    return f"{share['num_gpus']:g} GPUs" if "num_gpus" in share else f"{share['num_cpus']:g} CPUs"
