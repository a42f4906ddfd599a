"""Runs an experiment: checks, the stages in their order, the evaluations, the report."""

from __future__ import annotations

import logging
import time

from lqer.config import Config
from lqer.errors import ConfigError, LqerError, RunFailedError
from lqer.jobs.here import run_here
from lqer.phases import in_phase, phase
from lqer.report.assemble import Made, MeasuredText, assemble
from lqer.report.environment import device_name, peak_memory_bytes
from lqer.report.tracking import track
from lqer.report.write import draw_figures, layer_rows, write_page, write_tables
from lqer.results import Results
from lqer.run.chunks import Chunk
from lqer.run.experiment import Experiment
from lqer.run.exports import export_all, raise_refusals
from lqer.run.folder import RunLog, begin_run, link_checkpoint, locked
from lqer.run.jobs import jobs_of
from lqer.run.outcome import headline, write_traceback
from lqer.run.preflight import CheckedRun, check_run
from lqer.run.rehearsal import rehearsed
from lqer.run.texts import Texts
from lqer.stages.allocate_ranks import RankPlans, Ranks
from lqer.stages.allocate_widths import WidthPlans, Widths
from lqer.stages.base import Stage
from lqer.stages.gang import expect_gang
from lqer.store.store import Artifact, Store

log = logging.getLogger(__name__)


def run(config: Config) -> Results:
    """Run the experiment and write its folder; artifacts that the store has are reused. Returns results.json."""
    results = run_chunk(config, None)
    assert results is not None, "only a chunk can finish before the others"
    return results


def run_chunk(config: Config, chunk: Chunk | None) -> Results | None:
    """The same as one of several processes, each of which quantizes its chunk of the decoder blocks.

    Returns None while other chunks are missing; the last process to finish evaluates and reports. Raises ConfigError
    for a method whose blocks must be quantized in order, and for a gang.
    """
    if chunk is not None:
        refuse_chunks(config, chunk)
    started = time.monotonic()
    with RunLog() as run_log:
        try:
            results = _run(config, started, chunk, run_log)
        except OSError as error:
            if error.filename is not None or error.strerror is None:
                raise
            # What a run writes is below its output folder; calls on an open file do not say which file it is.
            raise OSError(error.errno, error.strerror, config.output_dir) from error
        except (LqerError, RunFailedError):
            raise
        except Exception as error:
            where = run_log.path or write_traceback(error)
            raise RunFailedError(f"{headline(error)} (traceback in {where})") from error
    if config.tracking is not None and results is not None:
        track(config.tracking, results)
    return results


def refuse_chunks(config: Config, chunk: Chunk) -> None:
    """Raise ConfigError if blocks cannot be quantized independently of each other, or by one process."""
    if config.cluster is not None and config.has_gang:
        raise ConfigError(f"--chunk {chunk}: one process works on a chunk; found cluster.gang {config.cluster.gang!r}")
    if config.quantize.propagates_error:
        parts = " and ".join(config.quantize.block_parts) or f"method {config.quantize.method.kind!r}"
        asked_by = "" if config.quantize.propagate_error else f" (implied by {parts})"
        raise ConfigError(
            f"--chunk {chunk}: requires quantize.propagate_error = false; with error propagation{asked_by} each block "
            "depends on the quantized blocks before it"
        )


def _run(config: Config, started: float, chunk: Chunk | None, run_log: RunLog) -> Results | None:
    if config.has_gang:
        expect_gang()
    with phase("checks"):
        checked = check_run(config, log.info)
    # Everything that can be refused has been: only now may the folder of an earlier run be changed.
    with locked(checked.folder, config.experiment, "" if chunk is None else f"-{chunk.index}-of-{chunk.count}"):
        begin_run(checked.folder, config.experiment)
        run_log.write_to(checked.folder)
        checked.context.fingerprints.save()
        return _run_stages(checked, started, chunk)


def _run_stages(checked: CheckedRun, started: float, chunk: Chunk | None) -> Results | None:
    """Obtain every artifact, then write the report. None while other chunks are missing."""
    context, experiment, store = checked.context, checked.experiment, checked.store
    config, summary = context.config, context.summary
    log.info(
        "%s: %s, %d linears in %d blocks, on %s",
        config.tag, config.model, len(summary.linears), summary.blocks, device_name(context.device),
    )  # fmt: skip
    jobs = jobs_of(experiment, summary.blocks, [] if chunk is None else [chunk])
    run_here(jobs.preparing, store)
    ranks, widths = _log_ranks(experiment, store), _log_widths(experiment, store)
    with rehearsed(checked):
        run_here(jobs.quantizing, store)
    if any(stage.find(store) is None for stage in experiment.quantizing()):
        log.info("chunk %s finished; waiting for the remaining chunks. The last one to finish evaluates.", chunk)
        return None
    run_here(jobs.training, store)
    checkpoint = experiment.checkpoint.artifact(store)
    # What the user keeps must be what was written.
    experiment.verify_unread(checkpoint, store)
    link_checkpoint(checked.folder, checkpoint.path)
    run_here(jobs.measuring, store)
    made = _collect(experiment, store, checked.texts, ranks, widths)
    return _report(checked, checkpoint, made, started)


@in_phase("report")
def _report(checked: CheckedRun, checkpoint: Artifact, made: Made, started: float) -> Results:
    """Write the report of what was made, and return what it says."""
    context, config, summary = checked.context, checked.context.config, checked.context.summary
    results = assemble(config, context.source, summary, context.device, checked.texts.calibration_info, made, started)
    for warning in results["warnings"]:
        log.warning("warning: %s", warning)
    results["exports"] = export_all(checked.folder, checkpoint.path, checked.exports, results, context.device)
    report = (checked.folder, results, layer_rows(checkpoint, summary.blocks), checkpoint, summary.blocks)
    draw_figures(*report)
    write_page(*report)
    # After the figures and the page, which take more memory than the stages of a small model.
    results["peak_memory_bytes"] = peak_memory_bytes(context.device, all_gpus=config.device_map == "auto")
    write_tables(*report)
    raise_refusals(results)
    return results


def _log_ranks(experiment: Experiment, store: Store) -> Ranks | None:
    """The ranks that quantize.low_rank.budget_bits leads to; None without a budget."""
    plans = experiment.quantize.plans
    if not isinstance(plans, RankPlans):
        return None
    ranks = plans.allocate(store)
    log.info(
        "budget: %.4f of %g bits, ranks %d to %d; summed relative error %.5g, at uniform rank %d (%.4f bits) %.5g",
        ranks.average_bits, plans.budget_bits, *ranks.range, ranks.allocation.objective,
        ranks.allocation.uniform_rank, ranks.uniform_average_bits, ranks.allocation.uniform_objective,
    )  # fmt: skip
    return ranks


def _log_widths(experiment: Experiment, store: Store) -> Widths | None:
    """The formats that quantize.budget_bits leads to; None without a budget."""
    plans = experiment.quantize.plans
    if not isinstance(plans, WidthPlans):
        return None
    widths = plans.allocate(store)
    names = plans.names
    uniform = "the narrowest" if widths.allocation.uniform is None else names[widths.allocation.uniform]
    log.info(
        "widths: %.4f of %g bits, %s; estimated divergence %.5g nats per token, with %s for all (%.4f bits) %.5g",
        widths.average_bits, plans.budget_bits,
        ", ".join(f"{count} of {name}" for name, count in zip(names, widths.counts, strict=True)),
        widths.allocation.loss, uniform, widths.uniform_average_bits, widths.allocation.uniform_loss,
    )  # fmt: skip
    return widths


def _collect(experiment: Experiment, store: Store, texts: Texts, ranks: Ranks | None, widths: Widths | None) -> Made:
    """All artifacts and measurements of a finished run."""

    def found(stage: Stage | None) -> Artifact | None:
        return None if stage is None else stage.artifact(store)

    measured = [stage for candidate in experiment.candidates for stage in experiment.evaluations(candidate)]
    perplexity = [
        MeasuredText(
            text.spec,
            text.source,
            text.fingerprint,
            {role: stages[i].result(store) for role, stages in experiment.perplexity.items()},
            {role: stages[i].result(store) for role, stages in experiment.divergence.items()},
        )
        for i, text in enumerate(texts.evaluation)
    ]
    return Made(
        token_weights=found(experiment.token_weights),
        calibration=found(experiment.calibration),
        ranks=ranks,
        widths=widths,
        quantized=experiment.quantize.artifact(store),
        rtn=found(experiment.rtn),
        finetuned=found(experiment.finetune),
        perplexity=perplexity,
        downstream={role: stage.result(store) for role, stage in experiment.downstream.items()},
        decode={role: stage.result(store)["tokens_per_second"] for role, stage in experiment.decode.items()},
        evaluate_seconds=sum(stage.artifact(store).seconds for stage in measured),
        overlaps=texts.overlaps,
    )
