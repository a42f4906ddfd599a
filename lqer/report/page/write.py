"""Writes report.html: the page of a run, and the page of a collection of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lqer.report.page import charts
from lqer.report.page.points import (
    Candidate,
    Measure,
    candidates_of,
    measures_of,
    model_name,
    originals_of,
    repeat_command,
)
from lqer.report.paragraphs import shown_calibration
from lqer.results import Results
from lqer.store.files import write_text

PAGE_FILE = "report.html"
# Heat maps: column of layers.csv, name, unit, whether colours are of logarithms.
HEAT_MAPS = (
    ("output_error", "output error, relative", "of the squared output", True),
    ("output_error_before", "output error of rounding alone, relative", "of the squared output", True),
    ("weight_error", "weight error, relative", "of the weight's norm", True),
    ("rank", "rank", "rank", False),
    ("bits", "bits per weight", "bits", False),
)
SPECTRA = (
    ("scaled", "rounding error, scaled by activations"),
    ("plain", "rounding error"),
    ("weight", "weights"),
)
LAYER_COLUMNS = ("rank", "bits", "weight_error", "output_error_before", "output_error")


@dataclass(frozen=True)
class Details:
    """What only the page of a single run shows.

    layers: layers.csv. block_losses: the losses of every block's optimization, empty without one. spectra:
    "<linear>.<role>" of the linears of one block, empty if none were measured.
    """

    layers: pd.DataFrame
    block_losses: Sequence[Sequence[float]] = ()
    spectra: Mapping[str, np.ndarray] = field(default_factory=dict)


def write_run_page(path: Path, results: Results, details: Details) -> None:
    """Write the page of a run."""
    candidates, originals = candidates_of(results), originals_of(results)
    _write(
        path,
        {
            **_comparison(candidates, originals),
            "title": results["tag"],
            "subtitle": f"{model_name(results)}, {results['model']['architecture']}",
            "results": results,
            "command": repeat_command(results["config"]),
            "calibrated_on": shown_calibration(results),
            "charts": _run_charts(results, details),
            "layers": [
                {"name": row["name"], "cells": [row[column] for column in LAYER_COLUMNS]}
                for row in details.layers.to_dict("records")
            ],
        },
    )


def write_collection_page(
    path: Path, runs: Sequence[Results], title: str, links: Mapping[str, str] | None = None
) -> None:
    """Write the page that compares runs, of one model or several.

    links: by tag, where the page of the run is, relative to `path`; a run without one is not linked.
    """
    hrefs = {tag: quote(link) for tag, link in (links or {}).items()}
    found = [candidates_of(run, hrefs.get(run["tag"], "")) for run in runs]
    # A scheme that has a run of its own is shown as that run, not as the baseline of another.
    candidates = _distinct([first for first, *_ in found] + [one for _, *baselines in found for one in baselines])
    originals = {measure: value for run in runs for measure, value in originals_of(run).items()}
    models = ", ".join(dict.fromkeys(model_name(run) for run in runs))
    _write(
        path,
        {
            **_comparison(sorted(candidates, key=lambda one: (one.model, one.bits, one.scheme)), originals),
            "title": title,
            "subtitle": f"{len(runs)} runs of {models}",
            "results": None,
            "command": None,
            "calibrated_on": None,
            "charts": [],
            "layers": [],
        },
    )


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without those that are the same in everything but their run as one before them."""
    seen, kept = set(), []
    for one in candidates:
        what = (one.model, one.scheme, one.weight, one.activation, one.rank, one.bits, frozenset(one.values.items()))
        if what not in seen:
            kept.append(one)
        seen.add(what)
    return kept


def _comparison(candidates: Sequence[Candidate], originals: Mapping[Measure, float]) -> dict[str, Any]:
    measures = measures_of(candidates, originals)
    costs = [cost for cost in charts.COSTS if any(cost.of(one) is not None for one in candidates)]
    several = len({measure.model for measure in measures}) > 1
    return {
        "candidates": candidates,
        "measures": measures,
        "originals": originals,
        "titles": [f"{one.model}: {one.title}" if several else one.title for one in measures],
        "costs": [cost.title for cost in costs],
        "pareto": [
            [charts.pareto(candidates, measure, originals.get(measure), cost) for cost in costs] for measure in measures
        ],
    }


def _run_charts(results: Results, details: Details) -> list[dict[str, Any]]:
    """Sections of a title, a text and one chart, or several to choose from by name."""
    layers = details.layers
    maps = [
        (name, charts.heat_map(layers, column, unit, logarithmic))
        for column, name, unit, logarithmic in HEAT_MAPS
        if layers[column].nunique(dropna=True) > 1 or column == "output_error"
    ]
    found = [
        _section("linears", "Linears by decoder block", "Measured on calibration inputs, before fine-tuning.", maps)
    ]
    if any(details.block_losses):
        text = "Squared error of each decoder block's output while it was optimized, from the first (blue) to the last."
        found.append(_section("losses", "Loss per round", text, [("", charts.block_losses(details.block_losses))]))
    if (finetune := results["finetune"]) is not None:
        chart = charts.finetune_losses(finetune["validation_loss"], finetune["original_loss"], finetune["best_epoch"])
        text = f"Trained: {', '.join(finetune['parts'])}; {finetune['tokens']} tokens an epoch."
        found.append(_section("finetuning", "Fine-tuning", text, [("", chart)]))
    if details.spectra:
        linears = [name for name in layers["name"] if f"{name}.weight" in details.spectra]
        block = linears[0].rsplit(".", 2)[0]
        spectra = [(name, charts.spectra(details.spectra, linears, role)) for role, name in SPECTRA]
        found.append(_section("spectra", f"Singular values, {block}", "Relative to the first.", spectra))
    return found


def _section(name: str, title: str, text: str, choices: Sequence[tuple[str, charts.Chart]]) -> dict[str, Any]:
    return {
        "id": name,
        "title": title,
        "text": text,
        "names": [name for name, _ in choices],
        "charts": [chart for _, chart in choices],
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    # Here, so that only what writes a page loads it.
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("lqer.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"number": shown_number, "breakable": breakable}
    read = partial(_resource, resources.files("lqer.report.page"))
    text = environment.get_template("page.html").render(
        **content, data=_data(content), style=read("page.css"), script=read("page.js"), plotly=Markup(get_plotlyjs())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _data(content: Mapping[str, Any]) -> dict[str, Any]:
    """What page.js reads."""
    measures = content["measures"]
    return {
        "measures": [
            {"title": one.title, "quantity": one.quantity, "model": one.model, "lower": one.lower_is_better}
            for one in measures
        ],
        "candidates": [
            {
                "scheme": one.scheme,
                "tag": one.tag,
                "model": one.model,
                "weight": one.weight,
                "activation": one.activation,
                "rank": one.rank,
                "bits": one.bits,
                "size": one.size,
                "parts": list(one.parts.items()),
                "values": [one.values.get(measure) for measure in measures],
                "command": one.command,
            }
            for one in content["candidates"]
        ],
        "pareto": content["pareto"],
        "sections": [{"id": section["id"], "charts": section["charts"]} for section in content["charts"]],
    }


def _resource(folder: Any, name: str) -> Markup:
    """A file of the package as it is: only ours are put into the page unescaped."""
    return Markup((folder / name).read_text(encoding="utf-8"))


def breakable(name: str) -> Markup:
    """The name as text that a narrow column may break after punctuation."""
    return Markup("<wbr>").join(re.split(r"(?<=[./_:-])|(?=\[)", name))


def shown_number(value: Any) -> str:
    """Five significant digits; a dash for what is missing."""
    if value is None or value != value:
        return "–"
    if not isinstance(value, float):
        return str(value)
    # Without an exponent as long as all digits can be written.
    return f"{value:.0f}" if 1e5 <= abs(value) < 1e9 else f"{value:.5g}"
