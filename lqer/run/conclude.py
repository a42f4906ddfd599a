"""The end of a sweep: the tables and pictures of its runs, the ranking, and a line for whatever failed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from lqer.report.collect import collect, write_collection
from lqer.report.page.write import PAGE_FILE, write_collection_page
from lqer.report.ranking import rank
from lqer.report.sweep import COSTS, TABLE_FOLDER, SweepRecord, read_runs, shown_table, write_ranking
from lqer.report.write import markdown_table
from lqer.run.sweep import SweepOutcome

log = logging.getLogger(__name__)


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
