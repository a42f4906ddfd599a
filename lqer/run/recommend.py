"""Finds the atlas that a recommendation is read from, and runs the cheap part of one where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from lqer.config.sweep import SweepPlan, plan_sweep
from lqer.errors import DataError
from lqer.models.source import resolve_model
from lqer.report.ranking import Ranking
from lqer.report.recommend import ATLAS, find_atlas
from lqer.report.sweep import SweepRecord, record_of
from lqer.run.sweep import Execute, conclude, run_sweep

log = logging.getLogger(__name__)

CHEAP = "cheap"


def atlas_of(
    config: str,
    overrides: Sequence[str],
    tag: str | None,
    execute: Execute | None = None,
    say: Callable[[str], None] = print,
) -> tuple[SweepRecord, Ranking]:
    """The atlas of a configuration's model: the newest one under its output_dir, or the sweep of a tag.

    execute: runs what the cheap part lacks if there is no atlas, or if an earlier call was interrupted; None: nothing
    is run. Raises DataError without an atlas, or if no run of it succeeded.
    """
    plan = plan_sweep(ATLAS, config, tag or ATLAS, overrides)
    subject = plan.runs[0].config
    fingerprint = resolve_model(subject.model, subject.revision).fingerprint

    def find() -> tuple[SweepRecord, Ranking]:
        return find_atlas(Path(subject.output_dir), subject.model, fingerprint, tag)

    if execute is None:
        return find()
    try:
        record, ranking = find()
        if record.tag != (tag or ATLAS) or not _missing(plan, record, ranking):
            return record, ranking
    except DataError:
        log.info("no atlas of %s yet: running its cheap part", subject.model)
    outcome = run_sweep(plan.part(CHEAP), execute)
    conclude(record_of(plan, config, tag or ATLAS, overrides), plan.output_dir, outcome, say)
    if not outcome.finished:
        name, line = next(iter(outcome.failed.items()))
        raise DataError(f"no run of the atlas succeeded; {name}: {line}")
    return find()


def _missing(plan: SweepPlan, record: SweepRecord, ranking: Ranking) -> bool:
    """Whether the atlas was begun and lacks runs of its cheap part; another sweep has none."""
    cheap = {run.name for run in plan.part(CHEAP).runs} & set(record.runs)
    return not cheap <= set(ranking.table["run"])
