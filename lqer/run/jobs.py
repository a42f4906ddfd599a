"""The jobs of a run: one for each stage, one for all evaluations of a model, several for what is made in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from lqer.jobs.graph import Job, Progress
from lqer.phases import phase
from lqer.run import costs
from lqer.run.chunks import Chunk
from lqer.run.experiment import Experiment
from lqer.stages.base import Stage, stages_in
from lqer.stages.calibrate import Calibrate, files_of
from lqer.stages.evaluate import Candidate, Divisible, WindowPerplexity
from lqer.stages.gang import GangStage
from lqer.stages.quantize import Quantize
from lqer.store.files import content_hash
from lqer.store.names import BLOCK
from lqer.store.store import Store

SECONDS_PER_MINUTE = 60.0


@dataclass(frozen=True)
class RunJobs:
    """The jobs of a run in their order.

    preparing: what quantization reads. training: fine-tuning. measuring: the evaluations.
    """

    preparing: tuple[Job, ...]
    quantizing: tuple[Job, ...]
    training: tuple[Job, ...]
    measuring: tuple[Job, ...]

    def __iter__(self) -> Iterator[Job]:
        return iter((*self.preparing, *self.quantizing, *self.training, *self.measuring))


@dataclass
class _Makers:
    """Which job makes which artifact. job_of: names of jobs by names of artifacts."""

    job_of: dict[str, str] = field(default_factory=dict)

    def needs(self, produces: Sequence[Stage], after: Sequence[str]) -> tuple[str, ...]:
        """The jobs that make what these stages read, and those in `after`."""
        read = [one.identity for stage in produces for one in stages_in(stage) if one is not stage]
        return tuple(dict.fromkeys([*after, *(self.job_of[one] for one in read if one in self.job_of)]))

    def stage_job(
        self, stage: Stage, minutes: float, after: Sequence[str] = (), progress: Progress | None = None
    ) -> Job:
        """The job that makes a stage as a whole. minutes: about how long that takes."""
        needs, shown = self.needs([stage], after), progress or Progress(stage.name)
        job = Job(stage.identity, (stage,), needs, stage.obtain, SECONDS_PER_MINUTE * minutes, shown)
        self.job_of[stage.identity] = job.name
        return job


def jobs_of(
    experiment: Experiment,
    blocks: int,
    chunks: Sequence[Chunk] = (),
    parts: int = 1,
    minutes: float = costs.OTHERWISE,
    units: Sequence[Mapping[str, int]] = (),
) -> RunJobs:
    """The jobs of one run of a model with `blocks` decoder blocks.

    chunks: the parts in which a checkpoint of independent blocks is made. Each has a job of its own, which can start
    once the statistics of its blocks are stored. If some chunks of the checkpoint are missing from the list, only those
    listed are made, and no other statistics are waited for. parts: how many parts an evaluation is made in, where it
    can be divided. minutes: about how long quantization takes. units: where jobs quantize less than a block, what they
    quantize (lqer/stages/alike.py) and how many weights that has, for each block.
    """
    makers = _Makers()
    preparing = tuple(
        makers.stage_job(stage, costs.CALIBRATION, progress=_by_blocks(stage, blocks))
        for stage in experiment.before_quantize()
    )
    if chunks and len(chunks) < chunks[0].count:
        ours = [index for chunk in chunks for index in chunk.blocks(blocks)]
        preparing = tuple(_of_chunks(job, ours) for job in preparing)
    quantizing: list[Job] = []
    for stage in experiment.quantizing():
        shares: list[Job] = []
        if isinstance(stage, Quantize):
            of_chunks = [_chunk(makers, stage, chunk, blocks, minutes, units) for chunk in chunks]
            quantizing += [job for of_chunk in of_chunks for job in of_chunk]
            shares = [of_chunk[-1] for of_chunk in of_chunks]
        if not shares:
            quantizing.append(makers.stage_job(stage, minutes, progress=_by_blocks(stage, blocks)))
        elif len(shares) == chunks[0].count:
            # Its blocks are made by then; what lies outside them remains.
            quantizing.append(
                makers.stage_job(stage, 0.0, [one.name for one in shares], Progress(stage.name, "block", 0))
            )
    training = tuple(makers.stage_job(stage, costs.FINETUNING) for stage in filter(None, (experiment.finetune,)))
    made_by = {"quantized": experiment.checkpoint, "rtn": experiment.rtn}
    measured = [(one, tuple(experiment.evaluations(one))) for one in experiment.candidates]
    measuring = [
        job
        for one, stages in measured
        if stages
        for job in _evaluation(makers, one, stages, made_by.get(one.role), parts)
    ]
    return RunJobs(preparing, tuple(quantizing), training, tuple(measuring))


def _by_blocks(stage: Stage, blocks: int) -> Progress | None:
    """The progress of a stage as a whole that leaves a file for each block."""
    return Progress(stage.name, "block", blocks, BLOCK) if isinstance(stage, GangStage) else None


def _of_chunks(job: Job, blocks: Sequence[int]) -> Job:
    """A job before quantization; where only these blocks are quantized, it waits for their statistics alone."""
    (stage,) = job.produces
    return replace(job, work=partial(stage.provide_blocks, indices=blocks)) if isinstance(stage, Calibrate) else job


def _chunk(
    makers: _Makers,
    stage: Quantize,
    chunk: Chunk,
    blocks: int,
    minutes: float,
    units: Sequence[Mapping[str, int]],
) -> list[Job]:
    """The job that writes the blocks of a chunk, last; before it the jobs of their linears, if `units` has any."""
    of_chunk, seconds = chunk.blocks(blocks), SECONDS_PER_MINUTE * minutes / blocks
    linears = [
        job for index in of_chunk if units for job in _linears(makers, stage, index, blocks, seconds, units[index])
    ]
    work = partial(stage.contribute, chunk=of_chunk, blocks=blocks)
    needs = makers.needs([stage], [one.name for one in linears])
    progress = Progress(stage.name, "block", len(of_chunk))
    rest = 0.0 if linears else seconds * len(of_chunk)
    name = f"{stage.identity} {chunk}"
    return [*linears, Job(name, (stage,), needs, work, rest, progress, enough=_enough(stage, of_chunk))]


def _enough(stage: Quantize, blocks: Iterable[int]) -> dict[str, tuple[str, ...]]:
    """The files of the statistics that these blocks need, if statistics are stored."""
    return {stage.calibration.identity: files_of(blocks)} if stage.calibration.is_kept else {}


def _linears(
    makers: _Makers, stage: Quantize, index: int, blocks: int, seconds: float, units: Mapping[str, int]
) -> Iterator[Job]:
    """A job for each unit of the linears of block `index`. seconds: what the whole block takes."""
    for unit, weights in units.items():
        work = partial(stage.contribute_linears, index=index, unit=unit, blocks=blocks)
        name = f"{stage.identity} {index + 1}/{blocks} {unit}"
        share, progress = seconds * weights / sum(units.values()), Progress(f"{stage.name} linears", "linear")
        needs = makers.needs([stage], ())
        yield Job(name, (stage,), needs, work, share, progress, enough=_enough(stage, [index]))


def _evaluation(
    makers: _Makers, candidate: Candidate, stages: tuple[Stage, ...], model: Stage | None, parts: int
) -> Iterator[Job]:
    """The evaluations of one model: jobs for parts of them, which leave the model in memory, then one for the rest."""
    # No job makes the checkpoint where this process has only one chunk of it.
    made = [] if model is None or model.identity not in makers.job_of else [makers.job_of[model.identity]]
    seconds = SECONDS_PER_MINUTE * costs.EVALUATION / len(stages)
    shares: list[Job] = []
    for stage in stages:
        count = min(parts, stage.most_parts) if isinstance(stage, Divisible) else 1
        if isinstance(stage, Divisible) and count > 1:
            shares += [_share(makers, stage, index, count, made, seconds / count) for index in range(count)]
    yield from shares

    def work(store: Store) -> None:
        for stage in stages:
            with phase("evaluate"):
                stage.obtain(store)
        candidate.release()

    name = f"evaluate-{content_hash([stage.identity for stage in stages])[:16]}"
    shared = {stage.identity for one in shares for stage in one.produces}
    rest = seconds * sum(stage.identity not in shared for stage in stages)
    needs = makers.needs(stages, [*made, *(one.name for one in shares)])
    yield Job(name, stages, needs, work, rest, Progress("evaluate"), candidate)
    makers.job_of |= {stage.identity: name for stage in stages}


def _share(makers: _Makers, stage: Divisible, index: int, count: int, after: list[str], seconds: float) -> Job:
    work = partial(stage.contribute, index=index, count=count)
    if isinstance(stage, WindowPerplexity):
        progress = Progress(stage.name, "window", stage.windows_of(index, count))
    else:
        progress = Progress(stage.name, "part")
    name = f"{stage.identity} {index + 1}/{count}"
    return Job(name, (stage,), makers.needs([stage], after), work, seconds, progress, stage.candidate)
