"""Runs a sweep on this machine, one experiment after another in the order of its file, and only those that are missing.

Every run is a process of its own, forked from one that has imported everything: its memory is free when it ends, its
peak is its own, and one that is killed takes no other with it. What runs have in common (statistics, the original's
evaluation) they find in the store.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lqer.config.plugins import load_plugins
from lqer.config.schema import Config
from lqer.config.sweep import SweepPlan, SweepRun
from lqer.report.collect import collect, write_collection
from lqer.report.environment import versions
from lqer.report.page.write import PAGE_FILE, write_collection_page
from lqer.report.ranking import rank
from lqer.report.sweep import COSTS, TABLE_FOLDER, SweepRecord, read_runs, shown_table, write_ranking
from lqer.report.write import markdown_table
from lqer.results import CHECKPOINT_LINK, RESULTS_FILE, SCHEMA_VERSION, Versions
from lqer.run.console import log_on_console, quieten_libraries
from lqer.run.outcome import EXIT_FAILURE, EXIT_INTERRUPTED, explain_failure, one_line
from lqer.stages.processes import death, held_back_interrupts, processes

log = logging.getLogger(__name__)

# So many first runs that fail with one line: the others would too.
MOST_ALIKE = 3
# How long a run that was interrupted may take to end by itself.
CLEANING_SECONDS = 3.0
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
    """In the unit that leaves one to three digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def conclude(record: SweepRecord, output_dir: Path, outcome: SweepOutcome, say: Callable[[str], None]) -> None:
    """Write the tables and pictures of all finished runs, print the ranking, and what failed with its line."""
    folder = output_dir / TABLE_FOLDER.format(tag=record.tag)
    paths = write_ranking(record, output_dir, outcome.failed)
    if paths:
        runs = read_runs(record, output_dir)
        tags = [results["tag"] for results in runs.values()]
        merged = collect(output_dir, f"{record.tag}-*")
        paths += write_collection(merged[merged["tag"].isin(tags)].reset_index(drop=True), folder)
        pages = {tag: os.path.relpath(output_dir / tag / PAGE_FILE, folder) for tag in tags}
        write_collection_page(folder / PAGE_FILE, list(runs.values()), record.tag, pages)
        for ranking in rank(runs):
            # The files say what a run cost; a terminal is narrow.
            shown = shown_table(ranking).drop(columns=list(COSTS), errors="ignore")
            say(f"\n{ranking.model}\n\n{markdown_table(shown)}\n")
    for path in paths:
        say(str(path))
    if paths:
        say(f"page: {folder / PAGE_FILE}")
    by_line: dict[str, list[str]] = {}
    for name, line in outcome.failed.items():
        by_line.setdefault(line, []).append(name)
    for line, names in by_line.items():
        log.error("failed: %s: %s", ", ".join(names), line)
    if outcome.not_started:
        log.error("not started: %s", ", ".join(run.name for run in outcome.not_started))


class InAProcess:
    """Executes each configuration in a process of its own."""

    def __init__(self, plugins: Sequence[str] = ()) -> None:
        self.plugins = tuple(plugins)
        # Forked from a server that has imported torch and never computed; not from this process.
        quieten_libraries()
        self.processes = processes(["lqer.run.preloaded"])

    def __call__(self, config: Config) -> str | None:
        ours, theirs = self.processes.Pipe(duplex=False)
        with held_back_interrupts():
            # pydantic would report an interrupt while it serializes as its own error.
            arguments = (config.model_dump_json(), self.plugins, theirs)
        process = self.processes.Process(target=_execute, args=arguments)  # type: ignore[attr-defined]
        try:
            with held_back_interrupts():
                process.start()
                theirs.close()
            process.join()
        except KeyboardInterrupt:
            # A terminal interrupts both processes, and the other one cleans up. A signal may have come to this one
            # alone: the store takes it that the other is ended.
            process.join(CLEANING_SECONDS)
            process.terminate()
            process.join()
            raise
        if process.exitcode == 0:
            return None
        if process.exitcode == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        try:
            return str(ours.recv())
        except EOFError:
            return f"the process {death(process.exitcode)}"


def _execute(config_json: str, plugins: Sequence[str], connection: Connection) -> None:
    """In the process of a run: its log and bars on the terminal, its problem as a line through the connection."""
    from transformers.utils import logging as transformers_logging

    from lqer.run import pipeline

    transformers_logging.disable_progress_bar()
    try:
        with log_on_console():
            load_plugins(plugins)
            pipeline.run(Config.model_validate_json(config_json, strict=True))
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception as error:
        connection.send(one_line(explain_failure(error)))
        raise SystemExit(EXIT_FAILURE) from None
