"""The picture of a leaderboard: the rows of files as points of perplexity over bits, with their Pareto front.

    python experiments/row_picture.py PICTURE.png FILE.json ... [--text NAME ...] [--model NAME ...] [--names] [--check]

A file of rows is one of docs/results/data (experiments/tables.py). One panel for each model (default: all) and text
(default: WikiText-2). Rows of other libraries are open; the front is over all rows, and --names names those on it. Rows
that round activations too are left out: they buy something else with their bits. The picture holds a hash of the rows
that it was drawn from: --check draws nothing, and its exit status is 1 if they have changed since.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from PIL import Image
from result_rows import ORIGINAL, ROWS, Row, merged, read_rows

from lqer.errors import DataError, LqerError
from lqer.report.families import FAMILIES, FEEDBACK, LATTICE, OTHER, Family
from lqer.report.front import pareto_front
from lqer.report.style import DPI, PAGE_INCHES, STYLE
from lqer.store.files import content_hash

# Rows of a model that is ruined would squeeze all others together.
MOST_TIMES_ORIGINAL = 8.0
MOST_HIDDEN_NAMES = 1
# Of names beside points.
LEAST_BITS_APART = 0.1
# Of a row: what no picture shows.
NOT_SHOWN = {"accuracy", "accuracy_error", "gb", "peak_gb", "tokens_per_second"}
# Of rows that name no family, by the first word of the scheme.
BY_NAME = {"trellis": LATTICE, "GPTQ": FEEDBACK}
MUTED = "#555555"
HASH_KEY = "rows"
TICKS = (10, 12, 14, 16, 18, 20, 25, 30, 40, 50, 70, 100, 150)


def draw(path: Path, rows: Sequence[Row], texts: Sequence[str], names: bool = False) -> None:
    """Write the picture. Raises DataError for a text on which no row was measured."""
    panels: list[tuple[str, str]] = []
    for text in texts:
        models = dict.fromkeys(row.model for row in rows if text in row.perplexity)
        if not models:
            raise DataError(f"no row has a perplexity on {text}")
        panels += [(model, text) for model in models]
    shown = [row for row in rows if not row.activations]
    with plt.rc_context(STYLE):
        size = (PAGE_INCHES, 2.9)
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
        for axis, (model, text) in zip(axes[0], panels, strict=True):
            _panel(axis, [row for row in shown if row.model == model and text in row.perplexity], text, names)
            axis.set_title(model if len(texts) == 1 else f"{model}, {text}")
            axis.set_xlabel("bits per weight, everything stored")
        axes[0][0].set_ylabel(f"perplexity, {texts[0]}" if len(texts) == 1 else "perplexity")
        figure.legend(handles=_legend(shown), ncols=5, loc="outside lower center")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Software": None, HASH_KEY: fingerprint(rows, texts)})
        plt.close(figure)


def fingerprint(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """A hash of what the picture shows."""
    return content_hash([*texts, ROWS.dump_python(list(rows), mode="json", exclude={"__all__": NOT_SHOWN})])


def drawn_from(path: Path) -> str:
    """The hash that a picture holds; empty for one without."""
    with Image.open(path) as picture:
        return str(picture.info.get(HASH_KEY, ""))


def family(row: Row) -> Family:
    first = row.scheme.replace(",", " ").split()[0]
    return next((one for one in FAMILIES if one.name == row.family), BY_NAME.get(first, OTHER))


def _method(row: Row) -> str:
    """What another library calls its method, without its own name, its version and the settings."""
    return re.sub(r" of .*| [\d.]+(post\d+)?$", "", row.scheme.split(",")[0])


def _panel(axis: Axes, rows: Sequence[Row], text: str, names: bool) -> None:
    original = next((row.perplexity[text] for row in rows if row.by == ORIGINAL), None)
    shown = [row for row in rows if row.by != ORIGINAL]
    limit = math.inf if original is None else MOST_TIMES_ORIGINAL * original
    hidden = [row for row in shown if row.perplexity[text] > limit]
    shown = [row for row in shown if row.perplexity[text] <= limit]
    bits, values = [row.bits for row in shown], [row.perplexity[text] for row in shown]
    front = pareto_front(bits, values)
    axis.plot([bits[i] for i in front], [values[i] for i in front], color=MUTED, linewidth=0.9, zorder=1)
    middle = (min(bits, default=0) + max(bits, default=0)) / 2
    for i, row in enumerate(shown):
        of, is_best, is_ours = family(row), i in front, row.by == "ours"
        axis.scatter(
            row.bits,
            values[i],
            marker=of.marker,
            s=26 if is_best else 16,
            facecolors=of.colour if is_ours else "none",
            edgecolors=of.colour,
            linewidths=0.9,
            alpha=0.55 if is_ours and not is_best else 1,
            zorder=3 if is_best else 2,
        )
        if not is_ours:
            place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "ha": "left", "va": "center"}
            axis.annotate(_method(row), (row.bits, values[i]), fontsize=6, color=MUTED, **place)
    if names:
        _name_front(axis, [shown[i] for i in front if shown[i].by == "ours"], text, middle)
    if original is not None:
        axis.axhline(original, color="#000000", linewidth=0.8, linestyle="--")
    if hidden:
        note = ", ".join(f"{row.scheme} ({row.perplexity[text]:.4g})" for row in hidden)
        above = f"above: {note}" if len(hidden) <= MOST_HIDDEN_NAMES else f"{len(hidden)} above"
        axis.text(0.99, 0.98, above, transform=axis.transAxes, fontsize=6, color=MUTED, ha="right", va="top")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator(TICKS))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.12)


def _name_front(axis: Axes, front: Sequence[Row], text: str, middle: float) -> None:
    """Names beside the points of the front, by rising bits; neighbours share a label, by rising perplexity."""
    groups: list[list[Row]] = []
    for row in front:
        if groups and row.bits - groups[-1][0].bits < LEAST_BITS_APART:
            groups[-1].append(row)
        else:
            groups.append([row])
    for together in groups:
        label, at = ", ".join(row.scheme for row in reversed(together)), together[0]
        side, offset = ("right", -5) if at.bits > middle else ("left", 5)
        place: dict[str, Any] = {"xytext": (offset, 4), "textcoords": "offset points", "ha": side, "va": "bottom"}
        name = axis.annotate(label, (at.bits, at.perplexity[text]), fontsize=6, color=MUTED, zorder=1.5, **place)
        name.set_path_effects([withStroke(linewidth=1.5, foreground="#FFFFFF")])


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    ours = {family(row) for row in rows if row.by == "ours"}
    handles = [
        Line2D([], [], color=of.colour, marker=of.marker, linestyle="", markersize=5, label=of.name)
        for of in FAMILIES
        if of in ours
    ]
    if any(row.by == "peer" for row in rows):
        label = "open: other libraries"
        handles.append(Line2D([], [], color=MUTED, marker="o", markerfacecolor="none", linestyle="", label=label))
    return [
        *handles,
        Line2D([], [], color=MUTED, linewidth=0.9, label="front"),
        Line2D([], [], color="#000000", linewidth=0.8, linestyle="--", label="original"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--text", action="append", dest="texts", metavar="NAME")
    parser.add_argument("--model", action="append", dest="models", metavar="NAME")
    parser.add_argument("--names", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    texts = arguments.texts or ["WikiText-2"]
    try:
        read = merged([], [row for file in arguments.files for row in read_rows(file)])
        rows = [row for row in read if not arguments.models or row.model in arguments.models]
        if arguments.check:
            return int(drawn_from(arguments.picture) != fingerprint(rows, texts))
        draw(arguments.picture, rows, texts, arguments.names)
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
