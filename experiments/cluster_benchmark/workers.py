"""Runs and sweeps by the workers of a Ray cluster on this machine, timed by what the driver says of each job."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import tomli_w
import torch

from cluster_benchmark.setup import TAG, Setup, header, made_files, perplexity_of, row, shown_equal
from lqer.config import read_config
from lqer.config.cluster import SHARES_OF_A_GPU
from lqer.config.sweep import plan_sweep
from lqer.jobs.on_ray import DONE, LOST
from lqer.run.cluster import fill_store, sweep_on_cluster
from lqer.run.preflight import check_run

SECONDS_BETWEEN_LOOKS = 0.01
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


class _Records(logging.Handler):
    """What the driver says in one form."""

    def __init__(self, message: str) -> None:
        super().__init__(logging.INFO)
        self._message, self._started = message, time.time()
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == self._message:
            self.found.append(record)
            # A call that is cut off prints no row; this much is known then.
            print(f"{record.created - self._started:.1f} s: {record.getMessage()}", file=sys.stderr, flush=True)


@contextmanager
def said(message: str) -> Iterator[list[logging.LogRecord]]:
    """What the driver logs within in the form of `message`; each line is shown on stderr at once."""
    handler, logger = _Records(message), logging.getLogger("lqer")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)


def jobs_in(records: Iterable[logging.LogRecord]) -> list[DoneJob]:
    """The jobs that ended, as the driver said so."""
    found = []
    for record in records:
        assert isinstance(record.args, tuple), "as the driver logs it"
        worker, name, seconds = record.args
        found.append(DoneJob(str(worker), str(name), float(str(seconds)), record.created))
    return found


def _on_cluster(workers: int) -> list[str]:
    """The settings of a cluster of this machine with so many workers: a GPU for each, or a share of one, or a CPU."""
    if not torch.cuda.is_available():
        # Sums on a CPU depend on the number of threads, and files are compared: one each, whatever the machine has.
        os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": workers})
        return ["--cluster.address=local", "--cluster.cpus_per_job=1"]
    gpus = _gpus()[:workers]
    # Ray gives out those that the driver sees.
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    share = SHARES_OF_A_GPU // math.ceil(workers / len(gpus)) / SHARES_OF_A_GPU
    return ["--cluster.address=local", f"--cluster.gpus_per_job={share}"]


@cache
def _gpus() -> list[str]:
    """Those that this process was started with."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(index) for index in range(torch.cuda.device_count())]


def time_parts(setup: Setup, presets: Sequence[str], workers: int, kills: bool) -> None:
    early = "parts begun before the last statistics"
    _header("run", early, "workers lost", "files equal to one process's", "perplexity")
    for preset in presets:
        config = read_config(setup.config(preset), TAG, [*_on_cluster(workers), *setup.overrides])
        assert config.cluster is not None, "the settings have one"
        split = config.cluster.split
        output = _output(setup, preset, split, workers)
        shutil.rmtree(output, ignore_errors=True)
        config = config.model_copy(update={"output_dir": str(output)})
        if kills:
            threading.Thread(target=_kill_a_worker, args=(output,), daemon=True).start()
        started = time.perf_counter()
        with said(DONE) as done, said(LOST) as lost:
            fill_store(config)
        seconds, jobs = time.perf_counter() - started, jobs_in(done)
        alone = made_files(setup.output(preset, 1)) or made_files(_output(setup, preset, "blocks", 1))
        equal = shown_equal(made_files(output), alone)
        perplexity = perplexity_of(check_run(config.alone, lambda line: None))
        begun = f"{begun_early(jobs)} of {sum(job.kind == 'quantize' for job in jobs)}"
        _row(f"{preset}, {split}", workers, jobs, seconds, begun, str(len(lost)), equal, f"{perplexity:.6f}")


def begun_early(jobs: Sequence[DoneJob]) -> int:
    """How many jobs of quantization began while statistics were still gathered."""
    gathered = max((job.end for job in jobs if job.kind == "calibrate"), default=0.0)
    return sum(job.start < gathered for job in jobs if job.kind == "quantize")


def _output(setup: Setup, preset: str, split: str, workers: int) -> Path:
    return setup.folder / f"parts-{preset}-{split}-{workers}"


def _kill_a_worker(output: Path) -> None:
    """Kill one of the workers that are busy once something is quantized."""
    while not any(output.glob("store/quantize-*.partial/*.json")):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if (process.cmdline() or [""])[0].startswith("ray::Worker.work"):
                process.kill()
                return


def time_sweep(setup: Setup, workers: int) -> None:
    path, folder = setup.folder / "sweep.toml", setup.folder / f"sweep-{workers}"
    path.write_text(tomli_w.dumps(SWEEP))
    overrides = [*_on_cluster(workers), *setup.overrides, f"--output_dir={folder}"]
    plan = plan_sweep(path, setup.config("lqer-act"), TAG, overrides)
    cluster = plan.runs[0].config.cluster
    assert cluster is not None, "the settings have one"
    started = time.perf_counter()
    with said(DONE) as done:
        outcome = sweep_on_cluster(plan, cluster, folder / "log")
    seconds, jobs = time.perf_counter() - started, jobs_in(done)
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
