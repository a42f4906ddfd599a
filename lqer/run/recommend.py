"""Finds the atlas that a recommendation is read from, and runs the cheap part of one where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from lqer.config.sweep import SweepPlan, plan_sweep
from lqer.errors import DataError
from lqer.models.source import pick_device, resolve_model
from lqer.report.ranking import Ranking
from lqer.report.recommend import ATLAS, find_atlas
from lqer.report.sweep import SweepRecord, record_of, write_record
from lqer.run.conclude import conclude
from lqer.run.sweep import SweepOutcome

log = logging.getLogger(__name__)

# Parts of the atlas, by the kind of device.
CHEAP = {"cpu": "cheap-cpu", "cuda": "cheap-gpu"}


def atlas_of(
    config: str,
    overrides: Sequence[str],
    tag: str | None,
    sweep: Callable[[SweepPlan, str], SweepOutcome] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[SweepRecord, Ranking]:
    """The atlas of a configuration's model: the newest one under its output_dir, or the sweep of a tag.

    sweep: runs what the cheap part lacks, under a tag, if there is no atlas, or if an earlier call was interrupted;
    None: nothing is run. Raises DataError without an atlas, or if no run of it succeeded.
    """
    plan = plan_sweep(ATLAS, config, tag or ATLAS, overrides)
    subject = plan.runs[0].config
    cheap = plan.part(CHEAP.get(pick_device(subject.device).type, CHEAP["cpu"]))
    fingerprint = resolve_model(subject.model, subject.revision).fingerprint

    def find() -> tuple[SweepRecord, Ranking]:
        return find_atlas(Path(subject.output_dir), subject.model, fingerprint, tag)

    if sweep is None:
        return find()
    try:
        record, ranking = find()
        # An atlas of another tag, or another sweep, is taken as it is.
        wanted = {run.name for run in cheap.runs} if record.tag == (tag or ATLAS) else set()
        if wanted & set(record.runs) <= set(ranking.table["run"]):
            return record, ranking
    except DataError:
        log.info("no atlas of %s yet: running its cheap part", subject.model)
    record = record_of(plan, config, tag or ATLAS, overrides)
    # What is finished can be read of a sweep that is interrupted, or still runs.
    write_record(record, plan.output_dir)
    outcome = sweep(cheap, tag or ATLAS)
    conclude(record, plan.output_dir, outcome, say)
    if not outcome.finished:
        name, line = next(iter(outcome.failed.items()))
        raise DataError(f"no run of the atlas succeeded; {name}: {line}")
    return find()
