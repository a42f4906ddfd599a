"""Merges the results of many runs into one table, one page, and one perplexity-over-bits plot per evaluated text."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from lqer.errors import DataError
from lqer.report import figures
from lqer.report.families import family_of, rtn_family
from lqer.report.naming import TEXT_DIGITS, rtn_name, scheme_name, weights_name
from lqer.report.page.write import PAGE_FILE, write_collection_page
from lqer.report.write import markdown_table
from lqer.results import RESULTS_FILE, PerplexityRow, Results, read_results
from lqer.store.files import write_atomically, write_text

# Perplexities are compared only between rows that agree on all of these.
SAME_MEASUREMENT = ["model", "dataset", "protocol", "seq_len", "tokens", "text"]


def collect(folder: Path, match: str = "*") -> pd.DataFrame:
    """One row per run and evaluated text (a run without perplexity gets one row), sorted by model, text and bits.

    Raises DataError if no run below `folder` matches.
    """
    table = pd.DataFrame([row for path in _found(folder, match) for row in _rows(read_results(path))])
    return table.sort_values([*SAME_MEASUREMENT, "bits", "tag"], kind="stable").reset_index(drop=True)


def write_collection(table: pd.DataFrame, out: Path) -> list[Path]:
    """Write results.csv, results.md and one pareto-*.png per measurement. Returns their paths."""
    csv, md = out / "results.csv", out / "results.md"
    shown = table.dropna(axis="columns", how="all")
    write_atomically(csv, lambda temporary: table.to_csv(temporary, index=False, float_format="%.6g"))
    write_text(md, markdown_table(shown) + "\n")
    paths = [csv, md]
    for (model, dataset, protocol, seq_len, *_), group in table.dropna(subset=["perplexity"]).groupby(SAME_MEASUREMENT):
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"pareto-{model}-{dataset}-{protocol}-{seq_len}").strip("-")
        figures.save_pareto(out / f"{name}.png", group, f"{model}, {dataset} ({protocol}, seq_len {seq_len})")
        paths.append(out / f"{name}.png")
    return paths


def write_page(folder: Path, match: str, out: Path) -> Path:
    """Write the page of the same runs to `out`, linked to their own pages. Returns its path."""
    runs = {path.parent: read_results(path) for path in _found(folder, match)}
    links = {
        run["tag"]: os.path.relpath(place / PAGE_FILE, out)
        for place, run in runs.items()
        if (place / PAGE_FILE).exists()
    }
    title = folder.resolve().name if match == "*" else match
    write_collection_page(out / PAGE_FILE, list(runs.values()), title, links)
    return out / PAGE_FILE


def _found(folder: Path, match: str) -> list[Path]:
    """The results of runs by tag. Raises DataError if there are none."""
    paths = [path for path in sorted(folder.glob(f"*/{RESULTS_FILE}")) if fnmatchcase(path.parent.name, match)]
    if not paths:
        raise DataError(f"no {RESULTS_FILE} under {folder}/{match}")
    return paths


def _rows(results: Results) -> list[dict]:
    quantize = results["config"]["quantize"]
    run = {
        "tag": results["tag"],
        "model": Path(results["model"]["name"]).name,
        "method": scheme_name(quantize),
        "family": family_of(results["config"]).name,
        "weight": weights_name(quantize),
        "activation": quantize["activation"],
        "rank": quantize["low_rank"]["rank"],
        "bits": results["bits"]["average"],
        # Rounding and transforms are those of the run: RTN only where it rounds to nearest.
        "rtn_method": rtn_name(quantize),
        "rtn_family": rtn_family(results["config"]).name,
        "rtn_bits": None if results["baseline"] is None else results["baseline"]["bits"]["average"],
    }
    tasks = {f"{row['task']} {row['metric']}": row["quantized"] for row in results["downstream"]}
    texts = [
        {key: row[key] for key in ("dataset", "protocol", "seq_len", "tokens", "original", "rtn")}
        | {"perplexity": row["quantized"], "text": row["fingerprint"][:TEXT_DIGITS]}
        | _divergence(row)
        for row in results["perplexity"]
    ] or [dict.fromkeys(("dataset", "protocol", "seq_len", "tokens", "original", "rtn", "perplexity", "text"))]
    return [run | text | tasks for text in texts]


def _divergence(row: PerplexityRow) -> dict[str, Any]:
    """The columns of a text's divergence: empty cells without one, in runs made before there was any too."""
    found = row.get("divergence")
    if found is None:
        return dict.fromkeys(("top_k", "kl_mean", "kl_p99", "top1_agreement", "rtn_kl_mean"))
    rtn_kl_mean = None if found["rtn"] is None else found["rtn"]["kl_mean"]
    return {"top_k": found["top_k"], **found["quantized"], "rtn_kl_mean": rtn_kl_mean}
