"""The report of a sweep: its ranking as a table and a picture, and a record from which others can read it later."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lqer.config.sweep import SweepPlan
from lqer.errors import DataError
from lqer.report.ranking import ACCURACY, ACCURACY_ERROR, Ranking, rank
from lqer.report.ranking_figure import save_ranking
from lqer.report.write import markdown_table
from lqer.results import RESULTS_FILE, Results, read_results
from lqer.store.files import content_hash, write_atomically, write_json, write_text

TABLE_FOLDER = "{tag}-table"
RECORD_FILE, RANKING_FILE, RANKING_TABLE = "sweep.json", "ranking.md", "ranking.csv"
COSTS = ("minutes", "peak GB", "tokens/s")
NOTE = """Bold: on the Pareto front. No run with at most as many bits, of weights and of activations, is better.
GB: the checkpoint, unquantized parameters included. Minutes: of quantization, without calibration that runs share.
"""
NOTE_ON_SPEED = "Tokens/s: one token at batch 1 without a cache, on kernels.\n"


@dataclass(frozen=True)
class SweepRecord:
    """sweep.json.

    runs: by name the tag, the presets that it extends, the keys that the sweep sets on top, and a hash of the resolved
    configuration.
    """

    sweep: str
    config: str
    tag: str
    command: str
    runs: Mapping[str, Mapping[str, Any]]

    def command_of(self, name: str) -> str:
        """The command that repeats one run."""
        return f"{self.command} --only {shlex.quote(name)}"


def record_of(plan: SweepPlan, config: str, tag: str, overrides: Sequence[str]) -> SweepRecord:
    """The record of a sweep over the configuration `config`, as they were named on the command line."""
    runs = {
        run.name: {
            "tag": run.config.tag,
            "extends": list(run.extends),
            "scheme": dict(run.scheme),
            "config": content_hash(run.config.experiment.model_dump(mode="json", exclude_none=True)),
        }
        for run in plan.runs
    }
    command = shlex.join(["lqer", "sweep", plan.path, config, tag, *overrides])
    return SweepRecord(plan.path, config, tag, command, runs)


def read_record(folder: Path) -> SweepRecord:
    """The record that a sweep left in `folder`, its table folder. Raises DataError for a file that is none."""
    path = folder / RECORD_FILE
    try:
        return SweepRecord(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise DataError(f"{path} is not the record of a sweep") from None


def read_runs(record: SweepRecord, output_dir: Path) -> dict[str, Results]:
    """The results of the finished runs, by name; not those that an older form of the sweep left under a tag."""
    found: dict[str, Results] = {}
    for name, run in record.runs.items():
        path = output_dir / run["tag"] / RESULTS_FILE
        if path.exists():
            results = read_results(path)
            if content_hash(results["config"]) == run["config"]:
                found[name] = results
    return found


def write_record(record: SweepRecord, output_dir: Path) -> Path:
    """Write sweep.json, from which the finished runs are found. Returns its folder."""
    folder = output_dir / TABLE_FOLDER.format(tag=record.tag)
    write_json(folder / RECORD_FILE, asdict(record))
    return folder


def write_ranking(record: SweepRecord, output_dir: Path, failed: Mapping[str, str]) -> list[Path]:
    """Write sweep.json, ranking.md, ranking.csv and one picture per text of the finished runs. Returns their paths."""
    folder = write_record(record, output_dir)
    rankings = rank(read_runs(record, output_dir))
    if not rankings:
        return []
    pictures: dict[Path, str] = {}
    for ranking in rankings:
        for text in dict.fromkeys(criterion.text for criterion in ranking.criteria):
            name = re.sub(r"[^A-Za-z0-9.]+", "-", f"ranking-{ranking.model}-{text or 'accuracy'}").strip("-")
            criteria = [criterion for criterion in ranking.criteria if criterion.text == text]
            title = f"{ranking.model}, {text or 'tasks'}"
            save_ranking(folder / f"{name}.png", ranking, criteria, title)
            pictures[folder / f"{name}.png"] = title
    tables = [ranking.table.assign(model=ranking.model, front=ranking.undominated) for ranking in rankings]
    table = pd.concat(tables, ignore_index=True)
    write_atomically(folder / RANKING_TABLE, lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    write_text(folder / RANKING_FILE, _page(record, rankings, pictures, failed))
    return [folder / RANKING_FILE, folder / RANKING_TABLE, *pictures]


def _page(
    record: SweepRecord, rankings: Sequence[Ranking], pictures: Mapping[Path, str], failed: Mapping[str, str]
) -> str:
    shown = {ranking.model: shown_table(ranking) for ranking in rankings}
    note = NOTE + (NOTE_ON_SPEED if any("tokens/s" in table for table in shown.values()) else "")
    parts = [f"# {record.tag}", f"`{record.command}`", note.strip()]
    for model, table in shown.items():
        parts += [f"## {model}", markdown_table(table)]
    parts += [f"![{title}]({path.name})" for path, title in pictures.items()]
    if failed:
        parts += ["## Failed", "\n".join(f"- `{name}`: {line}" for name, line in failed.items())]
    parts += ["## Repeat one row", "\n".join(f"    {record.command_of(name)}" for name in record.runs)]
    return "\n\n".join(parts) + "\n"


def shown_table(ranking: Ranking) -> pd.DataFrame:
    """The ranking as text: the original, the runs on a front by rising bits, then the dominated and what beats them."""
    table = ranking.table
    fronts = {criterion.column: ranking.front(criterion) for criterion in ranking.criteria}
    beaten, free = ranking.beaten_by(), ranking.undominated
    lines = []
    for index in [*table.index[free], *table.index[~free]]:
        row = table.loc[index]
        cells = {"run": row["run"], "bits": f"{row['bits']:.3f}", "GB": _digits(row["GB"])}
        cells["activations"] = "" if row["activations"] == "none" else row["activations"]
        for criterion in ranking.criteria:
            shown = _shown(row, criterion.column)
            cells[criterion.column] = f"**{shown}**" if fronts[criterion.column][index] else shown
        cells |= {column: _digits(row[column]) for column in COSTS}
        lines.append(cells | {"beaten by": beaten[index]})
    original = {criterion.column: _digits(ranking.originals.get(criterion.column)) for criterion in ranking.criteria}
    found = pd.DataFrame([{"run": "original", "bits": "16", **original}, *lines]).fillna("")[list(lines[0])]
    unused = [column for column in ("activations", "tokens/s") if not found[column].any()]
    return found.drop(columns=unused)


def _shown(row: pd.Series, column: str) -> str:
    error = row.get(ACCURACY_ERROR, math.nan) if column == ACCURACY else math.nan
    return _digits(row[column]) + ("" if math.isnan(error) else f" ± {error:.2g}")


def _digits(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"
