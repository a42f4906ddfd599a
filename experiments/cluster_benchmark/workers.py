"""Runs and sweeps by the workers of a Ray cluster on this machine, timed by what the driver says of each job."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import tomli_w
import torch

from cluster_benchmark.setup import TAG, Setup, header, made_files, perplexity_of, row, shown_equal
from lqer.config import read_config
from lqer.config.sweep import plan_sweep
from lqer.jobs.on_ray import DONE
from lqer.run.cluster import fill_store, sweep_on_cluster
from lqer.run.preflight import check_run

KINDS = ("calibrate", "quantize", "perplexity", "evaluate", "run")
# Twelve runs of three lengths, which share the statistics and the evaluation of the original.
SWEEP = {
    "run": [
        {"name": "qera-{quantize.weight}-{quantize.low_rank.rank}", "extends": "preset:qera-exact",
         "grid": {"quantize.weight": ["w4", "w3", "w2"], "quantize.low_rank.rank": [16, 32]}},
        {"name": "gptq-{quantize.weight}", "extends": "preset:gptq",
         "grid": {"quantize.weight": ["w4g128", "w3g128", "w2g64"]}},
        {"name": "lqer-{quantize.weight}", "extends": "preset:lqer-act",
         "grid": {"quantize.weight": ["w4", "w3", "w2"]}},
    ]
}  # fmt: skip


@dataclass(frozen=True)
class DoneJob:
    """A job that ended, by the driver's clock."""

    worker: str
    name: str
    seconds: float
    end: float

    @property
    def start(self) -> float:
        return self.end - self.seconds

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if self.name.startswith(kind))


class _DoneJobs(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[DoneJob] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == DONE and isinstance(record.args, tuple):
            worker, name, seconds = record.args
            self.found.append(DoneJob(str(worker), str(name), float(str(seconds)), record.created))


@contextmanager
def done_jobs() -> Iterator[list[DoneJob]]:
    """The jobs that end within, as the driver says so."""
    handler, logger = _DoneJobs(), logging.getLogger("lqer")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)


def _on_cluster(workers: int) -> list[str]:
    """The settings of a cluster of this machine with so many workers: a GPU for each, where there are any."""
    if not torch.cuda.is_available():
        return ["--cluster.address=local", f"--cluster.cpus_per_job={max(1, (os.cpu_count() or 1) // workers)}"]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    # Ray gives out those that the driver sees.
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen.split(",")[:workers])
    return ["--cluster.address=local"]


def time_parts(setup: Setup, presets: Sequence[str], workers: int) -> None:
    _header("run", "files equal to one process's", "perplexity")
    for preset in presets:
        output = setup.folder / f"parts-{preset}-{workers}"
        overrides = [*setup.overrides, f"--output_dir={output}", *_on_cluster(workers)]
        config = read_config(setup.config(preset), TAG, overrides)
        started = time.perf_counter()
        with done_jobs() as jobs:
            fill_store(config)
        seconds = time.perf_counter() - started
        equal = shown_equal(made_files(output), made_files(setup.output(preset, 1)))
        perplexity = perplexity_of(check_run(config.alone, lambda line: None))
        _row(preset, workers, jobs, seconds, equal, f"{perplexity:.6f}")


def time_sweep(setup: Setup, workers: int) -> None:
    path, folder = setup.folder / "sweep.toml", setup.folder / f"sweep-{workers}"
    path.write_text(tomli_w.dumps(SWEEP))
    overrides = [*setup.overrides, f"--output_dir={folder}", *_on_cluster(workers)]
    plan = plan_sweep(path, setup.config("lqer-act"), TAG, overrides)
    cluster = plan.runs[0].config.cluster
    assert cluster is not None, "the settings have one"
    started = time.perf_counter()
    with done_jobs() as jobs:
        outcome = sweep_on_cluster(plan, cluster, folder / "log")
    seconds = time.perf_counter() - started
    _header("sweep", "of the perfect time")
    work = sum(job.seconds for job in jobs)
    ratio = f"{_wall(jobs) * workers / work:.2f}" if jobs else "no job"
    _row(f"{len(outcome.finished)} of {len(plan.runs)} runs", workers, jobs, seconds, ratio)
    for name, line in outcome.failed.items():
        print(f"failed: {name}: {line}", flush=True)


def _wall(jobs: Sequence[DoneJob]) -> float:
    """From the start of the first to the end of the last."""
    return max(job.end for job in jobs) - min(job.start for job in jobs)


def _header(first: str, *last: str) -> None:
    kinds = [f"{kind} (jobs)" for kind in KINDS]
    header(first, "workers", "seconds", "with the start of Ray", *kinds, *last)


def _row(first: str, workers: int, jobs: Sequence[DoneJob], seconds: float, *last: str) -> None:
    wall = f"{_wall(jobs):.1f}" if jobs else "no job"
    row(first, workers, wall, f"{seconds:.1f}", *(_shown(jobs, kind) for kind in KINDS), *last)


def _shown(jobs: Sequence[DoneJob], kind: str) -> str:
    """Seconds of each worker in jobs of this kind, the busiest first, and how many jobs there were."""
    of_kind = [job for job in jobs if job.kind == kind]
    if not of_kind:
        return ""
    workers = {job.worker for job in of_kind}
    sums = sorted((sum(job.seconds for job in of_kind if job.worker == worker) for worker in workers), reverse=True)
    return f"{' + '.join(f'{seconds:.1f}' for seconds in sums)} ({len(of_kind)})"
