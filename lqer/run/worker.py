"""What a worker does of the jobs of a run or a sweep.

It is told a configuration and the name of a job, checks the run as any process does, and makes the same list of jobs.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lqer.config import Config
from lqer.config.plugins import load_plugins
from lqer.errors import ConfigError, LostProcessError, StoreError
from lqer.jobs.graph import Job, Loaded, Progress
from lqer.jobs.on_ray import Answer
from lqer.models.structure import within_block
from lqer.run import pipeline
from lqer.run.chunks import Chunk
from lqer.run.context import RunContext
from lqer.run.costs import quantization_minutes, takes_long
from lqer.run.jobs import RunJobs, jobs_of
from lqer.run.outcome import explain_failure, one_line
from lqer.run.preflight import CheckedRun, check_run
from lqer.stages.alike import units_of
from lqer.store.fingerprints import FINGERPRINTS
from lqer.store.keeper import Keeper
from lqer.store.locks import check_held
from lqer.store.own import OwnFolder
from lqer.store.remote import RemoteStore
from lqer.store.store import Store

log = logging.getLogger(__name__)

# A lock in the output_dir of a run or a sweep: a worker that sees it sees the folder.
MARK = ".cluster-{token}"
RUN = Progress("runs", "run")


class Parts(NamedTuple):
    """The most parts in which a run quantizes its blocks, and makes an evaluation.

    walking: the same for both, where each part reads all blocks. split: whether a part is a linear.
    """

    blocks: int
    evaluations: int
    walking: int
    split: Literal["auto", "blocks", "linears"] = "blocks"


def all_jobs_of(checked: CheckedRun, parts: Parts) -> RunJobs:
    """The jobs of a run."""
    config, blocks = checked.context.config, checked.context.summary.blocks
    minutes = quantization_minutes(config.quantize)
    count = min(parts.blocks, blocks)
    units: list[dict[str, int]] = []
    if checked.experiment.calibrate is None:
        # Each part gathers the statistics of its blocks on the way from the first one.
        count = min(count, parts.walking)
    elif parts.split != "blocks":
        units = units_of_blocks(checked.context, minutes if parts.split == "auto" else math.inf)
    if units:
        count = blocks
    chunks = [Chunk(index + 1, count) for index in range(count)] if count > 1 or units else []
    shares = min(parts.evaluations, parts.walking) if config.evaluation.blockwise else parts.evaluations
    return jobs_of(checked.experiment, blocks, chunks, shares, minutes, units)


def units_of_blocks(context: RunContext, minutes: float) -> list[dict[str, int]]:
    """What jobs of linears quantize of each block, and its weights; [] if no linear takes long.

    minutes: about how long quantization takes.
    """
    summary = context.summary
    planned = {name: shape for name, shape in summary.linears.items() if context.plans[name] is not None}
    if not takes_long(max(map(math.prod, planned.values())), minutes):
        return []
    found: list[dict[str, int]] = []
    for index in range(summary.blocks):
        shapes = within_block(planned, f"{summary.blocks_name}.{index}")
        weights = {name: math.prod(shape) for name, shape in shapes.items()}
        found.append({unit: sum(weights[name] for name in names) for unit, names in units_of(weights).items()})
    return found


def last_name(config: Config) -> str:
    """The name of a run's own job."""
    return f"run {config.tag}"


def last_job(config: Config, jobs: Sequence[Job]) -> Job:
    """The run itself, when all that it makes is there: it verifies, and writes the report."""
    needs = tuple(job.name for job in jobs)
    return Job(last_name(config), (), needs, lambda store: pipeline.run(config.alone), progress=RUN, at_home=True)


def perform(name: str, text: str, keeper: Keeper | None) -> Answer:
    """Do the job of this name."""
    with _collected_log() as lines:
        try:
            _KNOWN.run_of(text, keeper).do(name)
        except LostProcessError as error:
            return Answer(None, lines, lost=one_line(str(error)))
        except Exception as error:
            return Answer(one_line(explain_failure(error)), lines)
    return Answer(None, lines)


@dataclass(frozen=True)
class _KnownRun:
    """A run as a worker knows it."""

    store: Store
    jobs: dict[str, Job]

    def do(self, name: str) -> None:
        job = self.jobs[name]
        self.release(job.model)
        job.work(self.store)

    def release(self, but: Loaded | None = None) -> None:
        """Free the memory of models, except for one."""
        for job in self.jobs.values():
            if job.model is not None and job.model is not but:
                job.model.release()


class _KnownRuns:
    """The run of the last job: its checks, its folder, its model in memory."""

    def __init__(self) -> None:
        self._text: str | None = None
        self._run: _KnownRun | None = None
        self._own: OwnFolder | None = None

    def run_of(self, text: str, keeper: Keeper | None) -> _KnownRun:
        """The run that `text` tells of. Raises LqerError."""
        if self._run is None or text != self._text:
            if self._run is not None:
                self._run.release()
            self._run = self._learn(text, keeper)
            self._text = text
        return self._run

    def _learn(self, text: str, keeper: Keeper | None) -> _KnownRun:
        told = json.loads(text)
        # Relative paths are those of the driver, on nodes that have its folder.
        with suppress(OSError):
            os.chdir(told["started_in"])
        load_plugins(told["plugins"])
        config = Config.model_validate_json(told["config"], strict=True)
        if keeper is not None:
            config = config.model_copy(update={"output_dir": str(self._own_folder())})
        else:
            _check_folder(Path(config.output_dir), told["token"])
        checked = check_run(config, log.debug, told["card_share"])
        if keeper is not None:
            checked.context.fingerprints.save()
        if (kind := checked.context.device.type) != told["device"]:
            # Names depend on it.
            raise ConfigError(
                f"device: the driver computes on {told['device']}, this node on {kind}; start the driver on the same "
                "kind of device, or set device"
            )
        jobs = tuple(all_jobs_of(checked, Parts(*told["parts"])))
        store = checked.store if keeper is None else RemoteStore(checked.store.root, keeper, log.info)
        return _KnownRun(store, {job.name: job for job in (*jobs, last_job(config, jobs))})

    def _own_folder(self) -> Path:
        if self._own is None:
            self._own = OwnFolder()
            atexit.register(self._own.close)
        else:
            # Files of a local model are hashed once, not for every run.
            self._own.clear(but=FINGERPRINTS)
        return self._own.path


def _check_folder(folder: Path, token: str) -> None:
    """Raise StoreError unless it is that of the driver, and its lock keeps this process out."""
    mark = folder / MARK.format(token=token)
    if not mark.exists():
        raise StoreError(
            f"output_dir {folder.absolute()}: this node does not see the driver's folder; with "
            'cluster.store = "shared" it must be the same folder on every node'
        )
    check_held(mark, "output_dir")


_KNOWN = _KnownRuns()


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
