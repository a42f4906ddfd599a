"""The picture of a ranking: every quality over bits per weight and over the size of the checkpoint, with the fronts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lqer.report.figures import STYLE
from lqer.report.front import MOST_TIMES_BEST
from lqer.report.ranking import HALF_PRECISION_BITS, Measure, Ranking

WEIGHT_ONLY, WITH_ACTIVATIONS, DOMINATED, MUTED = "#0072B2", "#D55E00", "#9A9A9A", "#6A6A6A"
DPI = 150
# Of the x axis, as a share of its middle.
LEAST_SPAN = 0.25
# So many runs have room for the names of those that are dominated too.
MOST_NAMED = 8
SIZES = (("bits", "average bits per weight, everything stored"), ("GB", "checkpoint, GB"))
Y_LABELS = {"perplexity": "perplexity", "KL": "KL from the original, nats per token", "accuracy": "mean accuracy"}


def save_ranking(path: Path, ranking: Ranking, measures: Sequence[Measure], title: str) -> None:
    """One row of panels for each measure, over bits and over size.

    Coloured and named: on the front, among runs that round activations to at most as many bits. Grey: dominated.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(measures), len(SIZES), figsize=(11, 4.2 * len(measures)), squeeze=False, layout="constrained"
        )
        for line, measure in zip(axes, measures, strict=True):
            for axis, (size, label) in zip(line, SIZES, strict=True):
                _draw(axis, ranking, measure, size)
                axis.set_xlabel(label)
            line[0].set_ylabel(Y_LABELS[measure.quantity])
        handles = []
        for name, colour, marker in _kinds(ranking.table):
            handles.append(Line2D([], [], color=colour, marker=marker, label=f"front, {name}"))
            handles.append(Line2D([], [], color=DOMINATED, marker=marker, linestyle="", label=f"dominated, {name}"))
        handles.append(Line2D([], [], color="#000000", linestyle="--", linewidth=0.8, label="original"))
        figure.legend(handles=handles, ncols=len(handles), loc="outside lower center", fontsize=8)
        figure.suptitle(title, fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        plt.close(figure)


def _kinds(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(name, colour, marker) of the kinds of runs that there are."""
    weight_only = table["activation bits"] == HALF_PRECISION_BITS
    kinds = [("weight-only", WEIGHT_ONLY, "o")] if weight_only.any() else []
    return kinds + ([] if weight_only.all() else [("activations rounded too", WITH_ACTIVATIONS, "s")])


def _draw(axis: Axes, ranking: Ranking, measure: Measure, size: str) -> None:
    table = ranking.table.assign(front=ranking.front(measure, size)).dropna(subset=[measure.column, size])
    original = ranking.originals.get(measure.column)
    if original is not None:
        axis.axhline(original, color="#000000", linewidth=0.8, linestyle="--")
    if measure.quantity != "accuracy" and len(table):
        limit = MOST_TIMES_BEST * (original or table[measure.column].min())
        if measure.quantity == "perplexity":
            hidden = table[table[measure.column] > limit]
            if len(hidden):
                note = f"not shown, above {limit:.3g}: {', '.join(hidden['run'])}"
                axis.set_title(note, fontsize=7, loc="left", color="#555555", wrap=True)
            table = table[table[measure.column] <= limit]
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    # Room for the names beside the outermost points.
    axis.margins(x=0.18)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    for weight_only, colour, marker in ((True, WEIGHT_ONLY, "o"), (False, WITH_ACTIVATIONS, "s")):
        rows = table[(table["activation bits"] == HALF_PRECISION_BITS) == weight_only]
        beaten, best = rows[~rows["front"]], rows[rows["front"]].sort_values(size)
        axis.scatter(beaten[size], beaten[measure.column], s=16, color=DOMINATED, marker=marker, alpha=0.7, zorder=2)
        # One line for each width of activations: fronts of different widths are different questions.
        for _, same in best.groupby("activation bits"):
            axis.plot(
                same[size], same[measure.column], color=colour, marker=marker, markersize=5, linewidth=1, zorder=3
            )
        _name(axis, best, size, measure.column, colour, below=weight_only)
        if len(table) <= MOST_NAMED:
            _name(axis, beaten, size, measure.column, MUTED, below=weight_only)
    _widen(axis, LEAST_SPAN)


def _widen(axis: Axes, least: float) -> None:
    """Let the x axis span at least that share of where it is: runs of the same size stand above each other."""
    low, high = axis.get_xlim()
    missing = max(0.0, least * (low + high) / 2 - (high - low))
    axis.set_xlim(low - missing / 2, high + missing / 2)


def _name(axis: Axes, rows: pd.DataFrame, x: str, y: str, colour: str, below: bool) -> None:
    """Names of weight-only runs stand below their points, those of others above: the fronts lie above each other."""
    for name, left, height in zip(rows["run"], rows[x], rows[y]):
        axis.annotate(
            name, (left, height), xytext=(-3, -5) if below else (3, 5), textcoords="offset points", fontsize=6.5,
            color=colour, ha="right" if below else "left", va="top" if below else "bottom", zorder=4,
        )  # fmt: skip
