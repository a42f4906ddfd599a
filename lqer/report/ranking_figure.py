"""The picture of a ranking: every quality over bits per weight and over the size of the checkpoint, with the fronts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lqer.report.families import FAMILIES
from lqer.report.front import MOST_TIMES_BEST
from lqer.report.marks import INK, MUTED, NAME_SIZE, draw_front, draw_original, draw_scheme, legend_of, name_schemes
from lqer.report.ranking import HALF_PRECISION_BITS, Criterion, Ranking
from lqer.report.style import PAGE_INCHES, STYLE, save

# The shortest x axis, as a share of its middle.
LEAST_SPAN = 0.25
PANEL_HEIGHT = 3.0
# Up to this many runs, there is room for the names of dominated ones too.
MOST_NAMED = 8
MOST_HIDDEN_NAMES = 4
# For the name at the right of the last point, as a share of the x axis.
NAME_ROOM = 0.2
# Letters of a line above a panel.
NOTE_WIDTH = 64
SIZES = (("bits", "average bits per weight, everything stored"), ("GB", "checkpoint, GB"))
BY_NAME = {family.name: family for family in FAMILIES}
Y_LABELS = {"perplexity": "perplexity", "KL": "KL from the original, nats per token", "accuracy": "mean accuracy"}


def save_ranking(path: Path, ranking: Ranking, criteria: Sequence[Criterion], title: str) -> None:
    """One row of panels for each criterion, over bits and over size, in the colours of the families.

    Open: activations are rounded too. Joined: on the front, among runs that round them to at most as many bits. Faint:
    dominated.
    """
    with plt.rc_context(STYLE):
        inches = (PAGE_INCHES, PANEL_HEIGHT * len(criteria))
        figure, axes = plt.subplots(len(criteria), len(SIZES), figsize=inches, squeeze=False)
        for line, criterion in zip(axes, criteria, strict=True):
            for axis, (size, label) in zip(line, SIZES, strict=True):
                _draw(axis, ranking, criterion, size)
                axis.set_xlabel(label)
            line[0].set_ylabel(Y_LABELS[criterion.quantity])
        families = {BY_NAME[name] for name in ranking.table["family"]}
        handles = legend_of(families, "" if _weight_only(ranking.table).all() else "activations rounded too")
        figure.legend(handles=handles, ncols=4, loc="outside lower center")
        figure.suptitle(title)
        save(figure, path)


def _draw(axis: Axes, ranking: Ranking, criterion: Criterion, size: str) -> None:
    table = ranking.table.assign(front=ranking.front(criterion, size)).dropna(subset=[criterion.column, size])
    original = ranking.originals.get(criterion.column)
    if original is not None:
        draw_original(axis, original)
    if criterion.quantity != "accuracy" and len(table):
        limit = MOST_TIMES_BEST * (original or table[criterion.column].min())
        if criterion.quantity == "perplexity":
            hidden = table[table[criterion.column] > limit]
            if len(hidden):
                which = ", ".join(hidden["run"]) if len(hidden) <= MOST_HIDDEN_NAMES else f"{len(hidden)} runs"
                note = textwrap.fill(f"not shown, above {limit:.3g}: {which}", NOTE_WIDTH)
                axis.set_title(note, fontsize=NAME_SIZE, loc="left", color=MUTED)
            table = table[table[criterion.column] <= limit]
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    # Room for the names beside the outermost points.
    axis.margins(x=0.18)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    for row, is_filled in zip(table.to_dict("records"), _weight_only(table)):
        family = BY_NAME[row["family"]]
        draw_scheme(axis, row[size], row[criterion.column], family, is_best=row["front"], is_filled=is_filled)
    best = table[table["front"]].sort_values(size)
    # One line for each width of activations: fronts of different widths are different questions.
    for _, same in best.groupby("activation bits"):
        draw_front(axis, same[size], same[criterion.column])
    _widen(axis, LEAST_SPAN)
    if not _weight_only(best).all():
        low, high = axis.get_xlim()
        axis.set_xlim(low, high + NAME_ROOM * (high - low))
    # Names of weight-only runs stand below their points, those of others above: the fronts lie above each other.
    named = table if len(table) <= MOST_NAMED else best
    for is_best, colour in ((True, INK), (False, MUTED)):
        for is_filled in (True, False):
            rows = named[(named["front"] == is_best) & (_weight_only(named) == is_filled)]
            places = list(zip(rows["run"], rows[size], rows[criterion.column]))
            name_schemes(axis, places, colour=colour, below=is_filled)


def _weight_only(table: pd.DataFrame) -> pd.Series:
    return table["activation bits"] == HALF_PRECISION_BITS


def _widen(axis: Axes, least: float) -> None:
    """Let the x axis span at least that share of where it is: runs of the same size stand above each other."""
    low, high = axis.get_xlim()
    missing = max(0.0, least * (low + high) / 2 - (high - low))
    axis.set_xlim(low - missing / 2, high + missing / 2)
