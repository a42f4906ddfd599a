"""The jobs of a run: one for each stage, one for all evaluations of a model, several for a checkpoint in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from lqer.jobs.graph import Job
from lqer.phases import phase
from lqer.run.chunks import Chunk
from lqer.run.experiment import Experiment
from lqer.stages.base import Stage, stages_in
from lqer.stages.evaluate import Candidate
from lqer.stages.quantize import Quantize
from lqer.store.files import content_hash
from lqer.store.store import Store


@dataclass(frozen=True)
class RunJobs:
    """In the order of a run. preparing: what quantization reads; training: fine-tuning; measuring: the evaluations."""

    preparing: tuple[Job, ...]
    quantizing: tuple[Job, ...]
    training: tuple[Job, ...]
    measuring: tuple[Job, ...]

    def __iter__(self) -> Iterator[Job]:
        return iter((*self.preparing, *self.quantizing, *self.training, *self.measuring))


@dataclass
class _Makers:
    """The job that makes each artifact, by its name."""

    job_of: dict[str, str] = field(default_factory=dict)

    def job(
        self, name: str, produces: Sequence[Stage], work: Callable[[Store], object], after: Sequence[str] = ()
    ) -> Job:
        """A job that needs those that make what its stages read."""
        read = [one.identity for stage in produces for one in stages_in(stage) if one is not stage]
        needs = [*after, *(self.job_of[one] for one in read if one in self.job_of)]
        return Job(name, tuple(produces), tuple(dict.fromkeys(needs)), work)

    def stage_job(self, stage: Stage, after: Sequence[str] = ()) -> Job:
        job = self.job(stage.identity, (stage,), stage.obtain, after)
        self.job_of[stage.identity] = job.name
        return job


def jobs_of(experiment: Experiment, blocks: int, chunks: Sequence[Chunk] = ()) -> RunJobs:
    """The jobs of one run of a model with `blocks` decoder blocks.

    chunks: the parts in which a checkpoint of independent blocks is made, each by a job of its own; of a checkpoint
    whose chunks are not all there, only those are made.
    """
    makers = _Makers()
    preparing = tuple(makers.stage_job(stage) for stage in experiment.before_quantize())
    quantizing: list[Job] = []
    for stage in experiment.quantizing():
        parts = [_part(makers, stage, chunk, blocks) for chunk in chunks if isinstance(stage, Quantize)]
        quantizing += parts
        if not parts or len(parts) == chunks[0].count:
            quantizing.append(makers.stage_job(stage, [part.name for part in parts]))
    training = tuple(makers.stage_job(stage) for stage in filter(None, (experiment.finetune,)))
    made_by = {"quantized": experiment.checkpoint, "rtn": experiment.rtn}
    measured = [(one, tuple(experiment.evaluations(one))) for one in experiment.candidates]
    measuring = tuple(_evaluation(makers, one, stages, made_by.get(one.role)) for one, stages in measured if stages)
    return RunJobs(preparing, tuple(quantizing), training, measuring)


def _part(makers: _Makers, stage: Quantize, chunk: Chunk, blocks: int) -> Job:
    name = f"{stage.identity} {chunk}"
    return makers.job(name, (stage,), partial(stage.contribute, chunk=chunk.blocks(blocks), blocks=blocks))


def _evaluation(makers: _Makers, candidate: Candidate, stages: tuple[Stage, ...], model: Stage | None) -> Job:
    """All that a model is loaded for, once."""

    def work(store: Store) -> None:
        for stage in stages:
            with phase("evaluate"):
                stage.obtain(store)
        candidate.release()

    name = f"evaluate-{content_hash([stage.identity for stage in stages])[:16]}"
    # Nothing makes a checkpoint of which this process has one chunk.
    made = None if model is None else makers.job_of.get(model.identity)
    job = makers.job(name, stages, work, [] if made is None else [made])
    makers.job_of |= {stage.identity: name for stage in stages}
    return job
