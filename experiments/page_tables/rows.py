"""Rows of measured schemes, kept in docs/results/data/*.json: the facts that tables of pages are made from."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lqer.config.quantize import NOT_QUANTIZED
from lqer.errors import DataError
from lqer.report.families import family_of
from lqer.report.naming import scheme_name
from lqer.report.ranking import mean_accuracy
from lqer.report.sweep import read_record, read_runs

ORIGINAL, UNQUANTIZED_BITS = "original", 16.0
# What a run without texts measures.
APART = ("accuracy", "accuracy_error", "tokens_per_second")


class Row(BaseModel):
    """One measured scheme: what a table shows of it, and what repeats it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    scheme: str
    bits: float = Field(gt=0)  # average per quantized weight, everything stored counted
    perplexity: dict[str, float]  # by text
    kl: dict[str, float] = {}  # from the original, nats per token, by text
    accuracy: float | None = Field(default=None, ge=0, le=1)  # mean over tasks: acc_norm of each, else acc
    accuracy_error: float | None = Field(default=None, ge=0)  # its standard error
    minutes: float | None = Field(default=None, ge=0)  # of calibration, quantization and training
    gb: float | None = Field(default=None, gt=0)  # of the checkpoint's files
    peak_gb: float | None = Field(default=None, gt=0)  # GPU memory of the run, of the process without a GPU
    tokens_per_second: float | None = Field(default=None, gt=0)  # one token decoded at a time, on kernels
    command: str
    hardware: str
    date: datetime.date
    by: Literal["ours", "peer", "original"]  # who quantized it
    family: str = ""  # of lqer/report/families.py; empty: told by the first word of the scheme
    activations: str = ""  # the format of rounded inputs; empty: not rounded, or told by the scheme


ROWS = TypeAdapter(list[Row])


def read_rows(path: Path) -> list[Row]:
    """Raises DataError, one line, for a file that is not a list of rows."""
    try:
        return ROWS.validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def numbered_rows(path: Path) -> list[tuple[Row, int]]:
    """The rows of a file, each with the number of the line that holds its command. Raises DataError as `read_rows`."""
    rows, lines = read_rows(path), path.read_text(encoding="utf-8").splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if line.lstrip().startswith('"command":')]
    if len(numbers) != len(rows):
        raise DataError(
            f"{path}: every row must have its command on a line of its own, as experiments/tables.py writes"
        )
    return list(zip(rows, numbers, strict=True))


def rows_of(
    results: Mapping[str, Any],
    *,
    model: str,
    command: str,
    date: str,
    scheme: str | None = None,
    hardware: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> list[Row]:
    """The row of the original and that of the quantized model, of results.json or of a line of compare_peers.py.

    texts: the name of a text in tables, by its label. Raises KeyError for anything else than results.
    """
    texts = texts or {}
    by_peer = "peer" in results
    measured = results["texts"].items() if by_peer else ((row["dataset"], row) for row in results["perplexity"])
    ours, original, kl = {}, {}, {}
    for label, row in measured:
        name = texts.get(label, label)
        ours[name] = row["perplexity"] if by_peer else row["quantized"]
        original[name] = row["original"]
        divergence = {"kl_mean": row["kl_mean"]} if by_peer else (row["divergence"] or {}).get("quantized", {})
        kl[name] = divergence.get("kl_mean")
    facts = {} if by_peer else _measured(results, "quantized")
    common: dict[str, Any] = {
        "model": model,
        "command": command.replace("{tag}", results.get("tag", "")),
        "hardware": hardware or f"{results['device']}, torch {results['versions']['torch']}",
        "date": date,
    }
    quantized = Row(
        **common,
        scheme=scheme or _named(results, by_peer),
        bits=round(results["average_bits"] if by_peer else results["bits"]["average"], 4),
        perplexity=_known(ours),
        kl=_known(kl),
        minutes=_minutes(results),
        by="peer" if by_peer else "ours",
        **({} if by_peer else _parts(results["config"]) | _sizes(results)),
        **facts,
    )
    known = _known(original)
    facts = {} if by_peer else _measured(results, "original")
    plain = Row(**common, scheme=ORIGINAL, bits=UNQUANTIZED_BITS, perplexity=known, by="original", **facts)
    return [plain, quantized] if known or facts else [quantized]


def rows_of_sweep(table: Path, *, model: str, date: str, hardware: str | None, texts: Mapping[str, str]) -> list[Row]:
    """The rows of the finished runs of a sweep, named as the sweep names them, with the command that repeats each.

    table: the folder OUTPUT_DIR/TAG-table that the sweep left. Raises DataError where it left none.
    """
    record = read_record(table)
    facts: dict[str, Any] = {"model": model, "date": date, "hardware": hardware, "texts": texts}
    runs = read_runs(record, table.parent).items()
    found = [rows_of(results, command=record.command_of(name), scheme=name, **facts) for name, results in runs]
    if not found:
        raise DataError(f"{table}: the sweep has no finished run")
    return merged([], [row for rows in found for row in rows])


def _parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resolved configuration tells of a scheme besides its name."""
    activation = config["quantize"].get("activation", NOT_QUANTIZED)
    return {"family": family_of(config).name, "activations": "" if activation == NOT_QUANTIZED else activation}


def _sizes(results: Mapping[str, Any]) -> dict[str, Any]:
    found = {"gb": results.get("checkpoint_bytes"), "peak_gb": results.get("peak_memory_bytes")}
    # A run that found all stages done has used no GPU memory of its own.
    return {name: float(f"{size / 1e9:.4g}") for name, size in found.items() if size}


def _measured(results: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Accuracy and decode speed of the original or of the quantized model."""
    accuracy, error = mean_accuracy(results.get("downstream", []), role) or (None, None)
    found = {
        "accuracy": accuracy,
        "accuracy_error": error,
        "tokens_per_second": results.get("tokens_per_second", {}).get(role),
    }
    return _known({name: value for name, value in found.items() if value is None or math.isfinite(value)})


def _named(results: Mapping[str, Any], by_peer: bool) -> str:
    if not by_peer:
        return f"{scheme_name(results['config']['quantize'])}, {results['config']['quantize']['weight']}"
    settings = results["settings"]
    version = results["versions"].get(results["peer"], "")
    return f"{results['peer']} {version} int{settings['bits']} g{settings['group_size']}".replace("  ", " ")


def _minutes(results: Mapping[str, Any]) -> float | None:
    """Of what makes the checkpoint, statistics of the inputs included."""
    seconds = results.get("seconds")
    if isinstance(seconds, Mapping):
        seconds = seconds["calibrate"] + seconds["quantize"] + seconds["finetune"]
    return None if seconds is None else round(seconds / 60, 2)


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items() if value is not None}


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """New rows replace those of the same model and scheme in their place, others follow at the end.

    The original's row keeps what the new one did not measure. A run of a known scheme without any text adds to its row:
    decode speed is measured on a GPU that does nothing else.
    """
    rows = {(row.model, row.scheme): row for row in old}
    for row in new:
        known = rows.get((row.model, row.scheme))
        if known is not None and not row.perplexity:
            row = known.model_copy(update=row.model_dump(include=set(APART), exclude_none=True))
        elif known is not None and row.by == ORIGINAL:
            kept = known.model_dump(include=set(APART), exclude_none=True)
            kept |= row.model_dump(include=set(APART), exclude_none=True)
            row = row.model_copy(update=kept | {"perplexity": known.perplexity | row.perplexity})
        rows[row.model, row.scheme] = row
    return list(rows.values())
