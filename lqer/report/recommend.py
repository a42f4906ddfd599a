"""Which scheme of a finished atlas keeps most of a model's quality within a budget of bits or bytes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lqer.components import did_you_mean
from lqer.config.reader import parse_override
from lqer.errors import ConfigError, DataError
from lqer.report.ranking import Criterion, Ranking, rank
from lqer.report.sweep import RECORD_FILE, TABLE_FOLDER, SweepRecord, read_record, read_runs
from lqer.report.write import markdown_table
from lqer.store.offload import parse_bytes

ATLAS = "atlas"
MOST_SHOWN = 8
RATIO = "ratio"
# Times the budget: what a reader may want to know of although it does not fit.
A_LITTLE = 1.05
# Below, a divergence is rounding noise; its logarithm must exist.
LEAST_DIVERGENCE = 1e-9


@dataclass(frozen=True)
class Budget:
    """At most that many bits per weight, bytes of the checkpoint, bits of activations; None: any number."""

    bits: float | None = None
    size: int | None = None
    activation_bits: float | None = None

    def __str__(self) -> str:
        limits = {"{:g} bits": self.bits, "{:g} GB": self.size and self.size / 1e9, "activations of {:g} bits": None}
        limits["activations of {:g} bits"] = self.activation_bits
        return ", ".join(text.format(value) for text, value in limits.items() if value is not None)

    def wider(self, factor: float) -> Budget:
        """The budget with its bits and bytes multiplied by `factor`."""
        return Budget(
            None if self.bits is None else factor * self.bits,
            None if self.size is None else int(factor * self.size),
            self.activation_bits,
        )

    def admits(self, table: pd.DataFrame) -> pd.Series:
        """Which rows are within every limit."""
        limits = {"bits": self.bits, "GB": self.size and self.size / 1e9, "activation bits": self.activation_bits}
        within = [table[column] <= limit for column, limit in limits.items() if limit is not None]
        return pd.concat(within, axis="columns").all(axis="columns")


@dataclass(frozen=True)
class Recommendation:
    """The best row within the budget; criteria: what decided, the mean logarithm of them; others: the rest by score.

    above: better rows that miss the budget by little, the best first.
    """

    best: pd.Series
    others: pd.DataFrame
    criteria: tuple[Criterion, ...]
    above: pd.DataFrame


def find_atlas(output_dir: Path, model: str, fingerprint: str, tag: str | None) -> tuple[SweepRecord, Ranking]:
    """The newest atlas of a model under output_dir; with a tag, that sweep. Raises DataError without one."""
    folders = sorted(output_dir.glob(f"{TABLE_FOLDER.format(tag=tag or '*')}/{RECORD_FILE}"), key=_age)
    for path in folders:
        record = read_record(path.parent)
        if tag is None and Path(record.sweep).stem != ATLAS:
            continue
        for_model = {
            name: results
            for name, results in read_runs(record, output_dir).items()
            if fingerprint == results["model"]["fingerprint"]
        }
        if for_model:
            return record, rank(for_model)[0]
    if tag is not None:
        tags = [
            path.parent.name.removesuffix(TABLE_FOLDER.format(tag="")) for path in output_dir.glob(f"*/{RECORD_FILE}")
        ]
        known = f"; there are {', '.join(sorted(tags))}{did_you_mean(tag, tags)}" if tags else ""
        raise DataError(f"--atlas {tag}: no finished run of {model} under {output_dir}{known}")
    raise DataError(
        f"no atlas of {model} under {output_dir}; this makes one: lqer sweep atlas CONFIG TAG, or add --run"
    )


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def recommend(ranking: Ranking, budget: Budget) -> Recommendation:
    """Raises DataError where nothing is within the budget."""
    table = ranking.table
    criteria = _deciding(ranking)
    measured = table[[criterion.column for criterion in criteria]].clip(lower=LEAST_DIVERGENCE).map(math.log)
    scored = table.assign(score=measured.mean(axis="columns", skipna=False)).dropna(subset=["score"])
    within = scored[budget.admits(scored)]
    if within.empty:
        least = ", ".join(f"{scored[column].min():.4g} {column}" for column in ("bits", "GB", "activation bits"))
        raise DataError(f"no measured scheme is within {budget}; the smallest measured: {least}")
    within = within.sort_values(["score", "bits"], kind="stable")
    better = scored[budget.wider(A_LITTLE).admits(scored) & (scored["score"] < within["score"].iloc[0])]
    return Recommendation(within.iloc[0], within.iloc[1:], criteria, better.sort_values("score", kind="stable"))


def _deciding(ranking: Ranking) -> tuple[Criterion, ...]:
    """Divergences from the original where they were measured, else perplexities."""
    for quantity in ("KL", "perplexity"):
        found = tuple(criterion for criterion in ranking.criteria if criterion.quantity == quantity)
        if found:
            return found
    raise DataError("the atlas has neither perplexities nor divergences: set evaluation.perplexity")


def lines(found: Recommendation, ranking: Ranking, record: SweepRecord, budget: Budget) -> Iterator[str]:
    """What the command prints: what to take and how to repeat it, then a table of what it beats and by how much."""
    best, run = found.best, record.runs[found.best["run"]]
    yield f"{ranking.model}, within {budget}: take {best['run']} ({best['scheme']})"
    yield f"  preset     {', '.join(run['extends']) or 'none: the configuration of the sweep'}"
    yield f"  overrides  {overrides(_used(run['scheme'])) or 'none'}"
    yield f"  command    {record.command_of(best['run'])}"
    yield ""
    shown = [best, *(row for _, row in found.others.head(MOST_SHOWN).iterrows())]
    above = [row for _, row in found.above.head(1).iterrows()]
    yield markdown_table(pd.DataFrame([_original(ranking), *(_cells(row, found, ranking) for row in [*shown, *above])]))
    yield ""
    decided = " and ".join(criterion.text for criterion in found.criteria)
    mean = ", geometric mean" if len(found.criteria) > 1 else ""
    yield f"{RATIO}: {found.criteria[0].quantity} relative to {best['run']} ({decided}{mean})."
    yield "Columns that name a text alone are perplexities."
    if above:
        yield f"{above[0]['run']} is better, and a little above the budget."
    if len(found.others) > MOST_SHOWN:
        yield f"Within the budget, {len(found.others) - MOST_SHOWN} more are behind."
    if missing := [name for name in record.runs if name not in set(ranking.table["run"])]:
        more = f" and {len(missing) - MOST_SHOWN} more" if len(missing) > MOST_SHOWN else ""
        yield f"Not measured: {', '.join(missing[:MOST_SHOWN])}{more}. To add them:"
        yield f"  {record.command}"


def _original(ranking: Ranking) -> dict[str, Any]:
    known = {column: f"{value:.4g}" for column, value in ranking.originals.items()}
    return {"run": "original", "bits": "16", "GB": "", RATIO: ""} | {
        criterion.column: known.get(criterion.column, "") for criterion in ranking.criteria
    }


def _cells(row: pd.Series, found: Recommendation, ranking: Ranking) -> dict[str, Any]:
    """The cells of one scheme: its size, how much worse it is than the best by what decided, all that was measured."""
    ratio = math.exp(row["score"] - found.best["score"])
    facts = {"run": row["run"], "bits": f"{row['bits']:.3f}", "GB": f"{row['GB']:.4g}", RATIO: f"{ratio:.2f}"}
    values = {criterion.column: row[criterion.column] for criterion in ranking.criteria}
    return facts | {column: "" if math.isnan(value) else f"{value:.4g}" for column, value in values.items()}


def _used(scheme: Mapping[str, Any]) -> dict[str, Any]:
    """The scheme without number formats that none of its keys names: a sweep may define them for other runs."""
    named = str(scheme.get("quantize"))
    formats = {name: value for name, value in scheme.get("formats", {}).items() if f"'{name}'" in named}
    return {key: value for key, value in scheme.items() if key != "formats"} | ({"formats": formats} if formats else {})


def overrides(scheme: Mapping[str, Any]) -> str:
    """Nested keys as they are written on a command line."""
    return shlex.join(_override(key, value) for key, value in _leaves(scheme))


def _override(key: str, value: Any) -> str:
    word = f"--{key}={value}"
    # A string that means something else in TOML, such as true, needs its quotes.
    if isinstance(value, str) and parse_override(word) == parse_override(f"--{key}={_toml(value)}"):
        return word
    return f"--{key}={_toml(value)}"


def _leaves(scheme: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in scheme.items():
        if isinstance(value, dict) and "kind" not in value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _toml(value: Any) -> str:
    """A value of TOML on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def parse_budget(bits: str | None, size: str | None, activations: str | None) -> Budget:
    """Raises ConfigError for what is neither a number of bits nor a size such as "4GB", or where both are missing."""
    if bits is None and size is None:
        raise ConfigError("recommend: expected --bits 3.2 or --size 4GB")
    try:
        bytes_of_size = None if size is None else parse_bytes(size)
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from None
    return Budget(_number("--bits", bits), bytes_of_size, _number("--activations", activations))


def _number(option: str, text: str | None) -> float | None:
    try:
        number = None if text is None else float(text)
    except ValueError:
        number = math.nan
    if number is not None and not number > 0:
        raise ConfigError(f"{option}: must be a number of bits; found {text!r}")
    return number
