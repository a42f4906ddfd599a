"""Works through a schedule on the workers of a Ray cluster. The only file that imports ray, and only when it is called.

A worker is told the name of a job and a text that says what the job belongs to; it answers with one line if the job
failed. Workers read the model themselves. Where all nodes share a folder, they write artifacts there and nothing else
travels; where they do not, files go to a keeper on the driver's node, and come from it. A worker keeps what it has
imported and read for the next job. If it is lost, its job is done again by another, up to `retries` times, and so is
one whose gang lost a process; a job that failed is not.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from lqer.config.cluster import LOCAL, ClusterConfig
from lqer.errors import ConfigError, StoreError
from lqer.jobs.graph import Job, Loaded, Schedule
from lqer.jobs.progress import Bars, shown
from lqer.store.keeper import Keeper
from lqer.store.store import Store

log = logging.getLogger(__name__)

# Object store of a cluster started for one run on one machine: files travel through it only if a user asks for that.
LOCAL_STORE_BYTES = 100_000_000
# What the log says of a job: the worker, its name, and seconds.
DONE = "%s, %s: done in %.1f s"
# The same of one whose worker was lost: its name, how often, how often it is allowed, and why.
LOST = "warning: %s: its worker was lost; done again (%d of %d): %s"
# Files that workers read and write at the same time.
KEEPER_THREADS = 8
# Between two looks at which nodes have come or gone, and at which files there are of an artifact that jobs wait for.
SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_FILES = 2.0, 0.5
# For workers to remove what they have left on their nodes.
SECONDS_TO_END = 20.0
# For the head of a cluster to answer at all; Ray itself asks again for minutes.
SECONDS_TO_REACH = 10.0


class Answer(NamedTuple):
    """problem: the line of a job that failed. log: what the job logged. lost: that of one that can be done again."""

    problem: str | None
    log: list[str]
    lost: str | None = None


class Done(NamedTuple):
    """node: as Ray calls it. where: the host and the process, for the log."""

    answer: Answer
    node: str
    where: str
    seconds: float


# Does a job in a worker: (name, text, the keeper where no folder is shared) -> its answer. A function of a module,
# since Ray sends it by its name.
Perform = Callable[[str, str, Keeper | None], Answer]


class Worker:
    """What does jobs in a process of its own, with the GPUs that Ray gives it.

    keeper: the actor, where no folder is shared.
    """

    def __init__(self, perform: Perform, keeper: Any = None):
        import ray

        self._node = ray.get_runtime_context().get_node_id()
        self._perform = perform
        self._keeper = None if keeper is None else cast(Keeper, _KeptElsewhere(keeper))

    def work(self, name: str, text: str) -> Done:
        started = time.monotonic()
        answer = self._perform(name, text, self._keeper)
        return Done(answer, self._node, f"{platform.node()}/{os.getpid()}", time.monotonic() - started)


class _KeptElsewhere:
    """A keeper in another process: its methods, and what they raise."""

    def __init__(self, actor: Any):
        import ray

        self._ray, self._actor = ray, actor

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return self._ray.get(getattr(self._actor, method).remote(*arguments))
            except self._ray.exceptions.RayTaskError as error:
                # As it was raised there: Ray's own has the whole traceback as its text.
                raise error.cause from None

        return call


def run_on_ray(
    schedule: Schedule,
    texts: Mapping[str, str],
    perform: Perform,
    cluster: ClusterConfig,
    store: Store,
) -> None:
    """Do the jobs of `schedule`. texts: what a worker is told of each job, by name.

    store: what they make, in a folder that this process sees. Raises ConfigError if Ray is not
    installed or there is no such cluster. A KeyboardInterrupt ends all workers.
    """
    ray = _connected(cluster)
    try:
        with shown(schedule) as bars:
            _Workers(ray, schedule, texts, perform, cluster, store).work_through(bars)
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
    if ":" in cluster.address:
        _reach(cluster.address)
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
    # The last two are raised for a version of Ray or Python that is not the cluster's, and for a wrong token.
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(f"cluster.address {cluster.address!r}: {' '.join(str(error).split())}") from None
    return ray


def _reach(address: str) -> None:
    """Raise ConfigError unless something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_REACH).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"cluster.address {address!r}: no cluster answers there ({error})") from None


class _Share(NamedTuple):
    """What Ray reserves for a worker: an amount of its resource "GPU", else "CPU"."""

    kind: str
    amount: float

    @property
    def options(self) -> dict[str, float]:
        # Whoever has a GPU waits for no CPU: of these a node may have fewer than fractions of its GPUs.
        return {"num_cpus": self.amount} if self.kind == "CPU" else {"num_cpus": 0, "num_gpus": self.amount}

    def __str__(self) -> str:
        return f"{self.amount:g} {self.kind}s"


class _Idle(NamedTuple):
    """A worker on a node, with the model that it has in memory."""

    worker: Any
    node: str
    model: Loaded | None


@dataclass
class _Pool:
    """Workers of one kind. options: what Ray reserves for one, and where. most: how many there is room for."""

    options: dict[str, Any]
    keeper: Any
    most: int
    idle: list[_Idle] = field(default_factory=list)
    busy: int = 0

    def take(self, model: Loaded | None, kept: Collection[Loaded]) -> Any:
        """An idle worker, one that has this model in memory if there is one, and none that has one of `kept`."""
        free = [place for place, one in enumerate(self.idle) if not any(one.model is other for other in kept)]
        if not free:
            return None
        fitting = (place for place in free if self.idle[place].model is model)
        return self.idle.pop(next(fitting, free[-1])).worker


class _Workers:
    """Hands out the jobs of a schedule and takes in the answers."""

    def __init__(
        self,
        ray: Any,
        schedule: Schedule,
        texts: Mapping[str, str],
        perform: Perform,
        cluster: ClusterConfig,
        store: Store,
    ):
        self._ray, self._schedule, self._texts, self._perform = ray, schedule, texts, perform
        self._cluster, self._retries, self._store = cluster, cluster.retries, store
        self._share = _share(ray, cluster)
        keeper = None if cluster.shares_folder else self._keeper(store.root)
        self._away = _Pool(dict(self._share.options), keeper, 0)
        # Without a keeper every worker has the folder.
        self._home = self._away if keeper is None else _Pool({"num_cpus": 0, **self._here()}, None, 1)
        self._busy: dict[Any, tuple[Job, Any, _Pool]] = {}
        self._lost: Counter[str] = Counter()
        self._look()

    def work_through(self, bars: Bars) -> None:
        left = len(self._schedule.jobs) - len(self._schedule.done)
        log.info("%d jobs on up to %d workers of %s", left, self._away.most, self._share)
        while not self._schedule.is_over:
            self._look()
            self._look_for_files(bars)
            self._hand_out()
            if not self._busy:
                self._give_up()
                continue
            patience = SECONDS_BETWEEN_FILES if self._schedule.awaited() else SECONDS_BETWEEN_LOOKS
            ended, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=patience)
            for reference in ended:
                self._take_in(reference, bars)
        # Unlike the end of the connection, this lets a worker remove what it has left on its node.
        ends = [one.worker.__ray_terminate__.remote() for one in self._away.idle]
        if ends:
            self._ray.wait(ends, num_returns=len(ends), timeout=SECONDS_TO_END)

    def _look_for_files(self, bars: Bars) -> None:
        """What there is of the artifacts that are made, for jobs that wait for some files and for the bars."""
        counted = {job.name for job, _, _ in self._busy.values() if job.progress.counted is not None}
        for name in counted | self._schedule.awaited():
            # What is damaged there is refused by whoever reads it.
            with suppress(StoreError):
                files = self._store.files(name)
                self._schedule.see(name, files)
                bars.count(self._schedule.jobs[name], files)

    def _hand_out(self) -> None:
        ready = [self._schedule.jobs[name] for name in self._schedule.ready()]
        in_use = [job.model for job in ready if job.model is not None]
        for job in ready:
            pool = self._home if job.at_home else self._away
            if pool.busy >= pool.most:
                continue
            # What becomes ready one by one would make a worker read its model again each time.
            worker = pool.take(job.model, in_use if self._schedule.is_early(job.name) else ())
            if worker is None:
                if pool.busy + len(pool.idle) >= pool.most:
                    continue
                worker = self._ray.remote(Worker).options(**pool.options).remote(self._perform, pool.keeper)
            self._schedule.start(job.name)
            pool.busy += 1
            self._busy[worker.work.remote(job.name, self._texts[job.name])] = job, worker, pool

    def _take_in(self, reference: Any, bars: Bars) -> None:
        job, worker, pool = self._busy.pop(reference)
        pool.busy -= 1
        exceptions = self._ray.exceptions
        try:
            answer, node, where, seconds = self._ray.get(reference)
        # Ray's own watch over a node's memory reports what it has killed by another exception.
        except (exceptions.RayActorError, exceptions.OutOfMemoryError) as error:
            self._lose(job, _reason(error, isinstance(error, exceptions.OutOfMemoryError)), bars)
            return
        pool.idle.append(_Idle(worker, node, job.model))
        for line in answer.log:
            log.info("%s, %s: %s", where, job.name, line)
        if answer.lost is not None:
            self._lose(job, answer.lost, bars)
            return
        bars.end(job, f"{where}, {seconds:.1f} s")
        if answer.problem is None:
            self._schedule.finish(job.name)
            log.info(DONE, where, job.name, seconds)
        else:
            self._schedule.fail(job.name, answer.problem)

    def _lose(self, job: Job, reason: str, bars: Bars) -> None:
        self._lost[job.name] += 1
        after_loss(self._schedule, job.name, self._lost[job.name], self._retries, reason)
        if job.name in self._schedule.failed:
            bars.end(job)

    def _give_up(self) -> None:
        """No node is left that has room for a worker."""
        for name in self._schedule.ready():
            self._schedule.fail(name, f"{name}: no node of the cluster has {self._share} for a worker")

    def _look(self) -> None:
        """Which nodes there are: how many workers they have room for, and which idle ones are gone."""
        nodes = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        self._away.most = sum(map(self._room, nodes.values()))
        idle = [one for one in self._away.idle if one.node in nodes]
        # Where a node is gone, a worker that was to start there waits for what idle ones hold.
        beyond = max(0, self._away.busy + len(idle) - self._away.most)
        for one in idle[:beyond]:
            one.worker.__ray_terminate__.remote()
        self._away.idle = idle[beyond:]

    def _room(self, resources: Mapping[str, float]) -> int:
        """How many workers a node has room for."""
        kind, amount = self._share
        has = int(resources.get(kind, 0))
        return self._cluster.workers_on(has) if kind == "GPU" else int(has // amount)

    def _keeper(self, kept: Path) -> Any:
        """All that it knows is on the disk, so that a new one goes on where one was lost."""
        again = {"max_restarts": self._retries, "max_task_retries": self._retries}
        options = {"num_cpus": 0, "max_concurrency": KEEPER_THREADS, **again, **self._here()}
        return self._ray.remote(Keeper).options(**options).remote(kept)

    def _here(self) -> dict[str, Any]:
        """The options of a worker on the node of this process."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = self._ray.get_runtime_context().get_node_id()
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def after_loss(schedule: Schedule, name: str, times: int, retries: int, reason: str) -> None:
    """The worker of a job was lost, for the `times`-th time."""
    if times > retries:
        line = f"{name}: its worker was lost {times} times (cluster.retries {retries}), at last: {reason}; if memory"
        schedule.fail(name, f"{line} runs out, raise cluster.gpus_per_job or cluster.cpus_per_job")
    else:
        log.warning(LOST, name, times, retries, reason)
        schedule.again(name)


def _reason(error: Exception, out_of_memory: bool) -> str:
    """Why a worker was lost, of all that Ray says of it: the first sentence of its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # What follows the first line then are figures; what precedes the last one else are numbers of the worker.
    return (lines[0] if out_of_memory else lines[-1]).partition(". ")[0].removesuffix(".")


def _share(ray: Any, cluster: ClusterConfig) -> _Share:
    """What a worker of this cluster gets. Raises ConfigError for more than any node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = max(node.get("GPU", 0) for node in nodes)
    if not gpus:
        return _Share("CPU", min(cluster.cpus_per_job, max(node.get("CPU", 1) for node in nodes)))
    if cluster.gpus_per_job > gpus:
        raise ConfigError(f"cluster.gpus_per_job {cluster.gpus_per_job:g}: no node has more than {gpus:g} GPUs")
    return _Share("GPU", cluster.gpus_per_job)
