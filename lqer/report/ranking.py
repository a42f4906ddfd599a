"""Runs of one model side by side: which of them no other beats at its bits, and which are beaten, by what.

A run is beaten only by one that has at most its bits and rounds activations to at most as many bits: a scheme whose
matrix products are in low precision does something that a weight-only scheme does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lqer.formats import format_from_dict
from lqer.report.families import family_of
from lqer.report.naming import TEXT_DIGITS, scheme_name, weights_name
from lqer.results import DownstreamRow, PerplexityRow, Results

# What activations count that are not rounded: those of a model in half precision.
HALF_PRECISION_BITS = 16.0
# The first that a task has counts; tasks that have none are left out of the mean.
ACCURACIES = ("acc_norm", "acc")
ACCURACY, ACCURACY_ERROR = "mean accuracy", "± accuracy"


@dataclass(frozen=True)
class Criterion:
    """What runs are ranked by, in a column. quantity: perplexity, KL or accuracy; text: empty for accuracy."""

    column: str
    quantity: str
    text: str = ""

    @property
    def sign(self) -> int:
        """1 where lower is better."""
        return -1 if self.quantity == "accuracy" else 1


@dataclass(frozen=True)
class Ranking:
    """The runs of one model, by rising bits. originals: of the unquantized model, by column."""

    model: str
    table: pd.DataFrame
    criteria: tuple[Criterion, ...]
    originals: Mapping[str, float]

    def front(self, criterion: Criterion, size: str = "bits") -> pd.Series:
        """Which rows no other one beats: by a better value at no more than their size and activation bits."""
        values, sizes = self.table[criterion.column] * criterion.sign, self.table[size]
        inputs = self.table["activation bits"]
        on_front = []
        for value, own, bits in zip(values, sizes, inputs):
            rivals = values[(sizes <= own) & (inputs <= bits)]
            on_front.append(not math.isnan(value) and not math.isnan(own) and not (rivals < value).any())
        return pd.Series(on_front, index=self.table.index)

    @property
    def undominated(self) -> pd.Series:
        """Which rows are on the front of any criterion over bits."""
        fronts = [self.front(criterion) for criterion in self.criteria]
        return pd.concat(fronts, axis="columns").any(axis="columns") if fronts else self.table["bits"].isna()

    def beaten_by(self) -> pd.Series:
        """For each row on no front, the best run by the first criterion that has at most its bits; else ""."""
        if not self.criteria:
            # A sweep may time models alone.
            return pd.Series("", index=self.table.index)
        first, names = self.criteria[0], []
        for row, free in zip(self.table.to_dict("records"), self.undominated):
            rivals = self.table[
                (self.table["bits"] <= row["bits"])
                & (self.table["activation bits"] <= row["activation bits"])
                & (self.table["run"] != row["run"])
            ].dropna(subset=[first.column])
            best = rivals.loc[(rivals[first.column] * first.sign).idxmin(), "run"] if len(rivals) else ""
            names.append("" if free else best)
        return pd.Series(names, index=self.table.index)


def rank(runs: Mapping[str, Results]) -> list[Ranking]:
    """The rankings of runs by name, one of each model. Measurements that differ in any way are columns of their own."""
    models: dict[str, dict[str, Results]] = {}
    for name, results in runs.items():
        models.setdefault(results["model"]["fingerprint"], {})[name] = results
    return [_rank_one(found) for found in models.values()]


def _rank_one(runs: Mapping[str, Results]) -> Ranking:
    texts = _text_columns(list(runs.values()))
    criteria: dict[str, Criterion] = {}
    originals: dict[str, float] = {}
    rows = []
    for name, results in runs.items():
        row = _facts(name, results)
        for text in results["perplexity"]:
            column = texts[_measurement(text)]
            row[column] = text["quantized"]
            criteria[column] = Criterion(column, "perplexity", column)
            if text["original"] is not None:
                originals[column] = text["original"]
            divergence = text.get("divergence")
            if divergence is not None:
                row[f"KL {column}"] = divergence["quantized"]["kl_mean"]
                criteria[f"KL {column}"] = Criterion(f"KL {column}", "KL", column)
        if accuracy := mean_accuracy(results["downstream"], "quantized"):
            row[ACCURACY], row[ACCURACY_ERROR] = accuracy
            criteria[ACCURACY] = Criterion(ACCURACY, "accuracy")
        if plain := mean_accuracy(results["downstream"], "original"):
            originals[ACCURACY] = plain[0]
        rows.append(row)
    table = pd.DataFrame(rows).sort_values(["bits", "run"], kind="stable").reset_index(drop=True)
    table[list(criteria)] = table[list(criteria)].astype(float)
    model = Path(next(iter(runs.values()))["model"]["name"]).name
    return Ranking(model, table, tuple(criteria.values()), originals)


def _facts(name: str, results: Results) -> dict[str, Any]:
    config = results["config"]
    size, speed = results.get("checkpoint_bytes"), results.get("tokens_per_second", {}).get("quantized")
    return {
        "run": name,
        "scheme": scheme_name(config["quantize"]),
        "family": family_of(config).name,
        "weights": weights_name(config["quantize"]),
        "activations": config["quantize"]["activation"],
        "activation bits": activation_bits(config),
        "bits": results["bits"]["average"],
        "GB": math.nan if size is None else size / 1e9,
        "minutes": (results["seconds"]["quantize"] + results["seconds"]["finetune"]) / 60,
        "peak GB": results["peak_memory_bytes"] / 1e9,
        "tokens/s": math.nan if speed is None else speed,
    }


def activation_bits(config: Mapping[str, Any]) -> float:
    """Bits per value of the inputs of linears, scales included."""
    found = config.get("formats", {}).get(config["quantize"]["activation"])
    return HALF_PRECISION_BITS if found is None else format_from_dict(found).nominal_bits


def mean_accuracy(tasks: Sequence[DownstreamRow], role: str) -> tuple[float, float] | None:
    """The mean accuracy over tasks, and its standard error, NaN where that is unknown; None without such tasks."""
    chosen: dict[str, DownstreamRow] = {}
    for metric in reversed(ACCURACIES):
        chosen |= {task["task"]: task for task in tasks if task["metric"] == metric}
    values = [task[role] for task in chosen.values()]  # type: ignore[literal-required]
    if not values or None in values:
        return None
    errors = [task["stderr"] for task in chosen.values()]
    known = [error for error in errors if error is not None]
    error = math.sqrt(sum(error**2 for error in known)) / len(values) if len(known) == len(values) else math.nan
    return sum(values) / len(values), error


def _measurement(row: PerplexityRow) -> tuple[Any, ...]:
    return row["dataset"], row["protocol"], row["seq_len"], row["tokens"], row["fingerprint"]


def _text_columns(runs: Sequence[Results]) -> dict[tuple[Any, ...], str]:
    """The name of each measurement: the text's where that alone tells them apart."""
    found = list(dict.fromkeys(_measurement(row) for results in runs for row in results["perplexity"]))
    datasets = [measurement[0] for measurement in found]
    return {
        (dataset, protocol, seq_len, tokens, text): dataset
        if datasets.count(dataset) == 1
        else f"{dataset} ({protocol} {seq_len}, {tokens} tokens, {text[:TEXT_DIGITS]})"
        for dataset, protocol, seq_len, tokens, text in found
    }
