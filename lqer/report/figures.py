"""The figures that compare schemes: perplexities of one run, and perplexity over bits of many."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from lqer.report import front
from lqer.report.families import FAMILIES, Family
from lqer.report.style import STYLE, save
from lqer.results import PerplexityRow

ORIGINAL_COLOUR = "#555555"
ROLES = ("original", "rtn", "quantized")
LOG_SPAN = 3
LABEL_WIDTH = 28
# The size of a point among names, in pixels of the figure before it is saved.
MARKER = 5
# Where the name of a point may stand: offsets in points, and how the text is aligned.
PLACES = ((4, 4, "left", "bottom"), (-4, -4, "right", "top"), (4, -4, "left", "top"), (-4, 4, "right", "bottom"))


def save_perplexities(
    path: Path,
    rows: Sequence[PerplexityRow],
    names: Mapping[str, str],
    bits: Mapping[str, float],
    families: Mapping[str, Family],
) -> None:
    """One panel of bars per text: the candidates that `names` has by their roles, labelled by them.

    families: of the roles but "original".
    """
    shown = [role for role in ROLES if role in names and any(_value(row, role) is not None for row in rows)]
    with plt.rc_context({**STYLE, "axes.grid.axis": "y"}):
        figure, axes = plt.subplots(1, len(rows), figsize=(max(3.0, 2.4 * len(rows)), 2.6), squeeze=False)
        for axis, row in zip(axes.flat, rows):
            for place, role in enumerate(shown):
                value = _value(row, role)
                colour = families[role].colour if role in families else ORIGINAL_COLOUR
                # Without factors a scheme is of the same family as with them, unless it is plain rounding.
                faint = role == "rtn" and families["rtn"] is families["quantized"]
                label = f"{names[role]}, {bits[role]:.2f} bits" if role in bits else names[role]
                bar = axis.bar(
                    place, np.nan if value is None else value, 0.85, label=label, color=colour,
                    hatch="//" if faint else None, edgecolor="white", linewidth=0,
                )  # fmt: skip
                axis.bar_label(bar, fmt=_label, fontsize=7, padding=2)
            axis.set_xticks([])
            protocol = f"{row['protocol']}, seq_len {row['seq_len']}"
            axis.set_xlabel("\n".join([*textwrap.wrap(row["dataset"], LABEL_WIDTH), protocol]))
            axis.margins(y=0.15)
        axes.flat[0].set_ylabel("perplexity (lower is better)")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left")
        save(figure, path)


def _label(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def _value(row: PerplexityRow, role: str) -> float | None:
    return row[role]  # type: ignore[literal-required]


def save_pareto(path: Path, table: pd.DataFrame, title: str) -> None:
    """Perplexity over average bits, one point per run in the colour of its family, with the named Pareto front.

    A baseline without low-rank factors, where a run evaluated it, is a point of its own. The perplexity axis is
    logarithmic once it spans more than a factor of LOG_SPAN.
    """
    points = _with_baseline_points(table)
    original = table["original"].dropna()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.2, 3.8))
        for family in FAMILIES:
            group = points[points["family"] == family.name]
            if len(group):
                axis.scatter(
                    group["bits"], group["perplexity"], label=family.name, color=family.colour, marker=family.marker,
                    s=22, zorder=3, edgecolors="white", linewidths=0.4,
                )  # fmt: skip
        best = pareto_front(points)
        axis.plot(best["bits"], best["perplexity"], color="#777777", linewidth=1, zorder=2, label="Pareto front")
        if len(original):
            axis.axhline(original.iloc[0], color=ORIGINAL_COLOUR, linewidth=0.8, linestyle="--", label="original")
        lowest = min(points["perplexity"].min(), original.min() if len(original) else np.inf)
        if points["perplexity"].max() > LOG_SPAN * lowest:
            axis.set_yscale("log")
        axis.margins(0.12)
        axis.set_xlabel("average bits per weight, low rank and metadata included")
        axis.set_ylabel("perplexity")
        axis.set_title("\n".join(textwrap.wrap(title, 72)))
        figure.legend(loc="outside lower center", ncols=3)
        figure.canvas.draw()
        _name_points(axis, best, points)
        save(figure, path)


def _with_baseline_points(table: pd.DataFrame) -> pd.DataFrame:
    points = table[["method", "family", "bits", "perplexity"]]
    rtn = table[["rtn_method", "rtn_family", "rtn_bits", "rtn"]].dropna().drop_duplicates()
    rtn = rtn.set_axis(points.columns, axis="columns")
    # A scheme without factors is its own baseline.
    return pd.concat([points, rtn], ignore_index=True).drop_duplicates(subset=["family", "bits", "perplexity"])


def _name_points(axis: Axes, named: pd.DataFrame, points: pd.DataFrame) -> None:
    """Write the scheme beside each point where it covers no other point or name, and nowhere if there is no room."""
    renderer = axis.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    centres = axis.transData.transform(points[["bits", "perplexity"]].to_numpy(dtype=float))
    markers = [Bbox.from_bounds(x - MARKER / 2, y - MARKER / 2, MARKER, MARKER) for x, y in centres]
    boxes: list[Bbox] = []
    for name, bits, perplexity in named[["method", "bits", "perplexity"]].itertuples(index=False):
        for right, up, ha, va in PLACES:
            text = axis.annotate(
                name, (bits, perplexity), (right, up), textcoords="offset points", ha=ha, va=va, fontsize=6.5,
                in_layout=False,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and axis.bbox.y0 <= box.y0
            if inside and not any(box.overlaps(other) for other in (*markers, *boxes)):
                boxes.append(box)
                break
            text.remove()


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """The rows on the Pareto front (no other row has at most the bits and less perplexity), by increasing bits."""
    points = points.dropna(subset=["bits", "perplexity"])
    return points.iloc[front.pareto_front(list(points["bits"]), list(points["perplexity"]))]
