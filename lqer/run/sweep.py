"""Runs a sweep on this machine, one experiment after another in the order of its file, and only those that are missing.

What runs have in common (statistics, the original's evaluation) they find in the store.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lqer.config.schema import Config
from lqer.config.sweep import SweepPlan, SweepRun
from lqer.report.environment import versions
from lqer.results import RESULTS_FILE, SCHEMA_VERSION, Versions
from lqer.store.names import CHECKPOINT_LINK

log = logging.getLogger(__name__)

# If this many first runs fail with the same line, the others would too.
MOST_ALIKE = 3
# Runs a configuration; None, or the line that says why it failed.
Execute = Callable[[Config], str | None]


@dataclass(frozen=True)
class SweepOutcome:
    """finished: in the order of the file. failed: one line each, by name. not_started: after a failure."""

    finished: tuple[SweepRun, ...]
    failed: dict[str, str]
    not_started: tuple[SweepRun, ...]


def run_sweep(plan: SweepPlan, execute: Execute) -> SweepOutcome:
    """Run what is missing. Passes KeyboardInterrupt on.

    A run that fails ends the sweep unless it keeps going, which it does not if the first runs fail for the same reason:
    a text or a model that none of them can use.
    """
    code = versions()
    found = ((run.name, finished_seconds(run.config, code)) for run in plan.runs)
    durations = {name: seconds for name, seconds in found if seconds is not None}
    if durations:
        log.info("%d of %d runs are finished", len(durations), len(plan.runs))
    waiting = [run for run in plan.runs if run.name not in durations]
    failed: dict[str, str] = {}
    while waiting:
        run = waiting.pop(0)
        log.info("== %d of %d: %s", len(plan.runs) - len(waiting), len(plan.runs), run.config.tag)
        started = time.monotonic()
        problem = execute(run.config)
        if problem is not None:
            failed[run.name] = problem
            log.error("error: %s: %s", run.config.tag, problem)
            if not plan.keep_going or (not durations and _is_of_all(failed)):
                break
            continue
        durations[run.name] = time.monotonic() - started
        if waiting:
            done = [(one, durations[one.name]) for one in plan.runs if one.name in durations]
            log.info("%s", time_left(done, waiting))
    finished = tuple(run for run in plan.runs if run.name in durations)
    return SweepOutcome(finished, failed, tuple(waiting))


def _is_of_all(failed: Mapping[str, str]) -> bool:
    return len(failed) >= MOST_ALIKE and len(set(failed.values())) == 1


def finished_seconds(config: Config, code: Versions) -> float | None:
    """How long the run took if its folder holds the results of this very configuration, code and local files.

    None if anything differs: to run it again costs only what the store does not have.
    """
    folder = Path(config.output_dir) / config.tag
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        made = path.stat().st_mtime
    except (OSError, ValueError):
        return None
    made_by = results.get("versions", {})
    same_code = (made_by.get("lqer"), made_by.get("git")) == (code["lqer"], code["git"])
    same_config = results.get("config") == config.experiment.model_dump(mode="json", exclude_none=True)
    if results.get("schema_version") != SCHEMA_VERSION or not same_code or not same_config:
        return None
    if not (folder / CHECKPOINT_LINK).exists() or any(file.stat().st_mtime > made for file in _local_files(config)):
        return None
    return float(results["seconds"]["total"])


def _local_files(config: Config) -> list[Path]:
    """The files that a run reads from this machine: of the model, of its texts."""
    perplexity = config.evaluation.perplexity
    texts = [config.calibration.dataset, *(perplexity.datasets if perplexity else ())]
    texts += [config.finetune.dataset] if config.finetune else []
    paths = [Path(config.model), *(Path(text.path) for text in texts)]
    inside = [file for path in paths if path.is_dir() for file in path.iterdir() if file.is_file()]
    return [path for path in paths if path.is_file()] + inside


def time_left(done: Sequence[tuple[SweepRun, float]], waiting: Sequence[SweepRun]) -> str:
    """The estimate: a waiting run takes as long as finished ones of its kind did, else as long as all did."""
    by_kind: dict[Any, list[float]] = {}
    for run, seconds in done:
        by_kind.setdefault(_kind(run.config), []).append(seconds)
    all_seconds = [seconds for _, seconds in done]
    expected = [by_kind.get(_kind(run.config), all_seconds) for run in waiting]
    total = sum(sum(seconds) / len(seconds) for seconds in expected)
    unseen = sum(_kind(run.config) not in by_kind for run in waiting)
    told = f", {unseen} of them of kinds that have not finished yet" if unseen else ""
    return f"about {shown_duration(total)} left, from {len(done)} finished runs; {len(waiting)} to go{told}"


def _kind(config: Config) -> tuple[Any, ...]:
    """What decides how long a run takes, on one model and protocol."""
    quantize = config.quantize
    kinds = tuple(part.kind for part in quantize.transforms)
    weight = config.formats[quantize.weight].kind
    return quantize.chosen_rounding.kind, quantize.method.kind, weight, kinds, config.finetune is not None


def shown_duration(seconds: float) -> str:
    """A duration in the unit that leaves one to three digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
