"""Runs and sweeps whose jobs are done by the workers of a cluster.

The driver checks every run, names its jobs and gives them to the cluster's workers. What they make is then in the store
of the run's output_dir, and the run itself finds everything there. So a run on a cluster is the same run, and one that
was killed resumes as any other.

Workers write to that store themselves if all nodes share its folder; else each has a folder of its own with what passes
through it, and a keeper beside the driver does all the writing (lqer/store/remote.py).
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from lqer.config import Config
from lqer.config.cluster import LOCAL, ClusterConfig
from lqer.config.sweep import SweepPlan, SweepRun
from lqer.errors import LqerError, RunFailedError
from lqer.jobs.graph import Job, Schedule
from lqer.jobs.on_ray import run_on_ray
from lqer.report.environment import versions
from lqer.run.folder import RunLog, begin_run, locked, store_path
from lqer.run.outcome import explain_failure, one_line
from lqer.run.preflight import CheckedRun, check_run
from lqer.run.sweep import SweepOutcome, finished_seconds
from lqer.run.worker import MARK, Parts, all_jobs_of, last_job, last_name, perform
from lqer.store.locks import check_locks
from lqer.store.store import Store

log = logging.getLogger(__name__)

# The most parts in which independent blocks are quantized, and models evaluated, for all runs of a sweep together. On
# this machine there are several parts for each worker, so that workers end at about the same time.
PARTS, PARTS_OF_A_WORKER = 64, 4
# The same where each part reads all blocks of the model, and it is not known how many workers there will be.
WALKING_PARTS = 8
# What a worker is told of an output_dir that it does not see: it has its own.
ELSEWHERE = "elsewhere"


def fill_store(config: Config, plugins: Sequence[str] = ()) -> None:
    """Let the cluster of `config` make everything that the run needs; the run's log has what the workers log.

    Raises LqerError for what a check finds, RunFailedError with the line of a job that failed.
    """
    cluster = config.ray
    assert cluster is not None, "only a run with [cluster] has one"
    with RunLog() as run_log:
        checked = check_run(config.alone, log.info, cluster.card_share)
        parts = parts_of(cluster, 1)
        jobs = tuple(all_jobs_of(checked, parts))
        schedule = Schedule(jobs, [job.name for job in jobs if job.is_done(checked.store)])
        if schedule.is_over:
            return
        with locked(checked.folder, config.experiment), marked(Path(config.output_dir)) as token:
            begin_run(checked.folder, config.experiment)
            run_log.write_to(checked.folder)
            # Workers that see the folder need not hash the model again.
            checked.context.fingerprints.save()
            text = _Told(cluster, tuple(plugins), token, parts).of(config, checked, cluster.shares_folder)
            texts = dict.fromkeys(schedule.jobs, text)
            run_on_ray(schedule, texts, perform, cluster, checked.store)
        if schedule.failed:
            raise RunFailedError(next(iter(schedule.failed.values())))


def sweep_on_cluster(
    plan: SweepPlan, cluster: ClusterConfig, log_folder: Path, plugins: Sequence[str] = ()
) -> SweepOutcome:
    """Run what is missing of a sweep: jobs of all runs in one schedule, what they share once.

    log_folder: of the log of all workers.
    """
    code = versions()
    runs = {run.name: run for run in plan.runs}
    finished = {name for name, run in runs.items() if finished_seconds(run.config, code) is not None}
    jobs: list[Job] = []
    done: list[str] = []
    texts: dict[str, str] = {}
    failed: dict[str, str] = {}
    parts = parts_of(cluster, len(runs) - len(finished))
    with RunLog() as run_log, marked(plan.output_dir) as token:
        told = _Told(cluster, tuple(plugins), token, parts)
        for name, run in runs.items():
            if name in finished:
                continue
            config = run.config
            try:
                checked = check_run(config.alone, log.info, cluster.card_share)
            except LqerError as error:
                failed[name] = one_line(explain_failure(error))
                continue
            checked.context.fingerprints.save()
            of_run = tuple(all_jobs_of(checked, parts))
            done += [job.name for job in of_run if job.is_done(checked.store)]
            jobs += [*of_run, last_job(config, of_run)]
            text = told.of(config, checked, cluster.shares_folder)
            of_last = {last_name(config): told.of(config, checked, has_folder=True)}
            # A job that runs share belongs to the first of them.
            texts = dict.fromkeys((job.name for job in of_run), text) | of_last | texts
        if failed and not plan.keep_going:
            return SweepOutcome(_of(plan, finished), failed, _of(plan, runs.keys() - finished - failed.keys()))
        schedule = Schedule(jobs, done, stops_at_failure=not plan.keep_going)
        if not schedule.is_over:
            log_folder.mkdir(parents=True, exist_ok=True)
            run_log.write_to(log_folder)
            run_on_ray(schedule, texts, perform, cluster, Store(store_path(plan.runs[0].config)))
    last = {name: last_name(run.config) for name, run in runs.items()}
    finished |= {name for name in runs if last[name] in schedule.done}
    failed |= {name: schedule.failed[last[name]] for name in runs if last[name] in schedule.failed}
    return SweepOutcome(_of(plan, finished), failed, _of(plan, runs.keys() - finished - failed.keys()))


def _of(plan: SweepPlan, names: set[str]) -> tuple[SweepRun, ...]:
    return tuple(run for run in plan.runs if run.name in names)


@contextmanager
def marked(folder: Path) -> Iterator[str]:
    """Hold a lock in `folder` by which a worker knows that it sees the same folder, and its locks; its token.

    Raises StoreError where no lock keeps anybody out.
    """
    check_locks(folder, "output_dir")
    token = uuid.uuid4().hex
    mark = folder / MARK.format(token=token)
    try:
        with FileLock(mark):
            yield token
    finally:
        mark.unlink(missing_ok=True)


def parts_of(cluster: ClusterConfig, runs: int) -> Parts:
    """How each of `runs` runs is divided.

    Every part of an evaluation has to load the model, so where there are many runs, these are parts enough.
    """
    workers = _workers(cluster)
    most = max(1, (PARTS if workers is None else min(PARTS, PARTS_OF_A_WORKER * workers)) // max(1, runs))
    walking = WALKING_PARTS if workers is None else min(WALKING_PARTS, workers)
    if cluster.gang != 1:
        # A gang shares out the blocks itself.
        return Parts(1, most, walking)
    # With so many runs that blocks stay together, linears do too, unless they are asked for.
    split = "blocks" if cluster.split == "auto" and most == 1 else cluster.split
    return Parts(most, most, walking, split)


def _workers(cluster: ClusterConfig) -> int | None:
    """How many workers there are, if they are this machine's."""
    if cluster.address != LOCAL:
        return None
    gpus = torch.cuda.device_count()
    return max(1, cluster.workers_on(gpus) if gpus else (os.cpu_count() or 1) // cluster.cpus_per_job)


@dataclass(frozen=True)
class _Told:
    """What workers are told of every run. token: of the folder that some see (`marked`)."""

    cluster: ClusterConfig
    plugins: tuple[str, ...]
    token: str
    parts: Parts

    def of(self, config: Config, checked: CheckedRun, has_folder: bool) -> str:
        """What a worker is told of a job: the run that it belongs to. has_folder: it sees the run's output_dir."""
        alone = config.alone if has_folder else config.alone.model_copy(update={"output_dir": ELSEWHERE})
        return json.dumps(
            {
                "config": alone.model_dump_json(),
                "plugins": self.plugins,
                "token": self.token,
                "parts": self.parts,
                "device": checked.context.device.type,
                "card_share": self.cluster.card_share,
                "started_in": str(Path.cwd()),
            }
        )
