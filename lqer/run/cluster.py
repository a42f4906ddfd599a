"""Runs and sweeps whose jobs are done by the workers of a cluster.

The process that was started checks every run, names its jobs and gives them to the cluster's workers. They write to the
store of the run's output_dir, which all nodes share; then the run itself finds everything there. So a run on a cluster
is the same run, and one that was killed resumes as any other.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from lqer.config import Config
from lqer.config.plugins import load_plugins
from lqer.config.schema import ClusterConfig
from lqer.config.sweep import SweepPlan, SweepRun
from lqer.errors import LqerError, RunFailedError, StoreError
from lqer.jobs.graph import Job, Schedule
from lqer.jobs.on_ray import Answer, run_on_ray
from lqer.report.environment import versions
from lqer.run import pipeline
from lqer.run.chunks import Chunk
from lqer.run.jobs import RunJobs, jobs_of
from lqer.run.outcome import explain_failure, one_line
from lqer.run.preflight import CheckedRun, check_run
from lqer.run.sweep import SweepOutcome, finished_seconds

log = logging.getLogger(__name__)

# In how many parts a run quantizes blocks that do not depend on each other; a sweep has runs enough.
PARTS = 8
MARK = ".cluster-{token}"


def fill_store(config: Config, plugins: Sequence[str] = ()) -> None:
    """Let the cluster of `config` make everything that the run needs.

    Raises LqerError for what a check finds, RunFailedError with the line of a job that failed.
    """
    assert config.cluster is not None, "only a run with [cluster] has one"
    checked = check_run(config.alone, log.info)
    jobs = tuple(_jobs_of(checked, PARTS))
    schedule = Schedule(jobs, [job.name for job in jobs if job.is_done(checked.store)])
    if schedule.is_over:
        return
    with marked(Path(config.output_dir)) as token:
        text = _told(config, plugins, token, PARTS)
        run_on_ray(schedule, dict.fromkeys(schedule.jobs, text), perform, config.cluster)
    if schedule.failed:
        raise RunFailedError(next(iter(schedule.failed.values())))


def sweep_on_cluster(plan: SweepPlan, cluster: ClusterConfig, plugins: Sequence[str] = ()) -> SweepOutcome:
    """Run what is missing of a sweep: jobs of all runs in one schedule, what they share once."""
    code = versions()
    runs = {run.name: run for run in plan.runs}
    finished = {name for name, run in runs.items() if finished_seconds(run.config.alone, code) is not None}
    jobs: list[Job] = []
    done: list[str] = []
    texts: dict[str, str] = {}
    failed: dict[str, str] = {}
    with marked(plan.output_dir) as token:
        for name, run in runs.items():
            if name in finished:
                continue
            config = run.config
            try:
                checked = check_run(config.alone, log.info)
            except LqerError as error:
                failed[name] = one_line(explain_failure(error))
                continue
            of_run = tuple(_jobs_of(checked, 1))
            done += [job.name for job in of_run if job.is_done(checked.store)]
            with_last = (*of_run, _last_job(config, of_run))
            jobs += with_last
            # A job that runs share belongs to the first of them.
            texts = dict.fromkeys((job.name for job in with_last), _told(config, plugins, token, 1)) | texts
        if failed and not plan.keep_going:
            return SweepOutcome(_of(plan, finished), failed, _of(plan, runs.keys() - finished - failed.keys()))
        schedule = Schedule(jobs, done, stops_at_failure=not plan.keep_going)
        if not schedule.is_over:
            run_on_ray(schedule, texts, perform, cluster)
    last = {name: _last_name(run.config) for name, run in runs.items()}
    finished |= {name for name in runs if last[name] in schedule.done}
    failed |= {name: schedule.failed[last[name]] for name in runs if last[name] in schedule.failed}
    return SweepOutcome(_of(plan, finished), failed, _of(plan, runs.keys() - finished - failed.keys()))


def _of(plan: SweepPlan, names: set[str]) -> tuple[SweepRun, ...]:
    return tuple(run for run in plan.runs if run.name in names)


def _jobs_of(checked: CheckedRun, parts: int) -> RunJobs:
    blocks = checked.context.summary.blocks
    count = min(parts, blocks)
    chunks = [Chunk(index + 1, count) for index in range(count)] if count > 1 else []
    return jobs_of(checked.experiment, blocks, chunks)


def _last_name(config: Config) -> str:
    return f"run {config.tag}"


def _last_job(config: Config, jobs: Sequence[Job]) -> Job:
    """The run itself, when all that it makes is there: it verifies, and writes the report."""
    return Job(_last_name(config), (), tuple(job.name for job in jobs), lambda store: pipeline.run(config.alone))


@contextmanager
def marked(folder: Path) -> Iterator[str]:
    """Leave a file in `folder` by which a worker knows that it sees the same folder; its token."""
    token = uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK.format(token=token)
    mark.touch()
    try:
        yield token
    finally:
        mark.unlink(missing_ok=True)


def _told(config: Config, plugins: Sequence[str], token: str, parts: int) -> str:
    """What a worker is told of a job: the run that it belongs to."""
    return json.dumps(
        {"config": config.alone.model_dump_json(), "plugins": list(plugins), "token": token, "parts": parts}
    )


def perform(name: str, text: str) -> Answer:
    """In a worker: do the job of this name."""
    with _collected_log() as lines:
        try:
            checked, jobs = _known_run(text)
            jobs[name].work(checked.store)
        except Exception as error:
            return Answer(one_line(explain_failure(error)), lines)
    return Answer(None, lines)


@lru_cache(maxsize=1)
def _known_run(text: str) -> tuple[CheckedRun, dict[str, Job]]:
    """The run and its jobs; that of the last call is kept. Raises LqerError."""
    told = json.loads(text)
    load_plugins(told["plugins"])
    config = Config.model_validate_json(told["config"], strict=True)
    output = Path(config.output_dir)
    if not (output / MARK.format(token=told["token"])).exists():
        raise StoreError(
            f"output_dir {output.absolute()}: this node does not see the folder of the process that was started; it "
            "must be the same folder on every node"
        )
    checked = check_run(config, log.debug)
    jobs = tuple(_jobs_of(checked, told["parts"]))
    return checked, {job.name: job for job in (*jobs, _last_job(config, jobs))}


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _collected_log() -> Iterator[list[str]]:
    """What this package logs within the block."""
    handler, ours = _Lines(), logging.getLogger("lqer")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        yield handler.lines
    finally:
        ours.removeHandler(handler)
