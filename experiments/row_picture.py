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
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox
from page_tables.rows import ORIGINAL, ROWS, Row, merged, read_rows
from PIL import Image

from lqer.errors import DataError, LqerError
from lqer.report.families import FAMILIES, FEEDBACK, LATTICE, OTHER, Family
from lqer.report.front import pareto_front
from lqer.report.marks import MUTED, NAME_SIZE, draw_front, draw_original, draw_scheme, legend_of, name_schemes
from lqer.report.style import DPI, PAGE_INCHES, STYLE
from lqer.store.files import content_hash

# Rows of a model that is ruined would squeeze all others together.
MOST_TIMES_ORIGINAL = 8.0
MOST_HIDDEN_NAMES = 1
# Left of the first point a name stands.
NAME_INCHES = 0.75
# Of a row: what no picture shows.
NOT_SHOWN = {"accuracy", "accuracy_error", "gb", "peak_gb", "tokens_per_second"}
# Of rows that name no family, by the first word of the scheme.
BY_NAME = {"trellis": LATTICE, "GPTQ": FEEDBACK}
HASH_KEY = "rows"
TICKS = (5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 25, 30, 40, 50, 70, 100, 150)


def draw(path: Path, rows: Sequence[Row], texts: Sequence[str], names: bool = False) -> None:
    """Write the picture. Raises DataError for a text on which no row was measured."""
    panels: list[tuple[str, str]] = []
    for text in texts:
        models = dict.fromkeys(row.model for row in rows if text in row.perplexity)
        if not models:
            raise DataError(f"no row has a perplexity on {text}")
        panels += [(model, text) for model in models]
    shown = [row for row in rows if not row.activations]
    name_room = NAME_INCHES * len(panels) / PAGE_INCHES if names else None
    with plt.rc_context(STYLE):
        size = (PAGE_INCHES, 2.9)
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
        peers = []
        for axis, (model, text) in zip(axes[0], panels, strict=True):
            of_panel = [row for row in shown if row.model == model and text in row.perplexity]
            peers.append(_panel(axis, of_panel, text, name_room))
            axis.set_title(model if len(texts) == 1 else f"{model}, {text}")
            axis.set_xlabel("bits per weight, everything stored")
        axes[0][0].set_ylabel(f"perplexity, {texts[0]}" if len(texts) == 1 else "perplexity")
        families = {family(row) for row in shown if row.by == "ours"}
        handles = legend_of(families, "other libraries" if any(row.by == "peer" for row in shown) else "")
        figure.legend(handles=handles, ncols=5, loc="outside lower center")
        # Only then is it known where points lie.
        figure.draw_without_rendering()
        for axis, points in zip(axes[0], peers, strict=True):
            _name_peers(axis, points)
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


def _name_peers(axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names, bits and perplexities: each name right of its point, or as far below as others leave it no room."""
    placed: list[Bbox] = []
    for name, bits, value in sorted(points, key=lambda point: -point[2]):
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "left", "va": "center", "in_layout": False}
        label = axis.annotate(name, (bits, value), (5, 0), fontsize=NAME_SIZE, color=MUTED, **place)
        below = 0
        while any(label.get_window_extent().overlaps(other) for other in placed):
            below += 1
            label.set_position((5, -below))
        placed.append(label.get_window_extent())


def _panel(axis: Axes, rows: Sequence[Row], text: str, name_room: float | None) -> list[tuple[str, float, float]]:
    """Draw the points; the names, bits and perplexities of those of other libraries.

    name_room: left of the points, as a share of the axis, if those on the front are named.
    """
    original = next((row.perplexity[text] for row in rows if row.by == ORIGINAL), None)
    shown = [row for row in rows if row.by != ORIGINAL]
    limit = math.inf if original is None else MOST_TIMES_ORIGINAL * original
    hidden = [row for row in shown if row.perplexity[text] > limit]
    shown = [row for row in shown if row.perplexity[text] <= limit]
    bits, values = [row.bits for row in shown], [row.perplexity[text] for row in shown]
    front = pareto_front(bits, values)
    draw_front(axis, [bits[i] for i in front], [values[i] for i in front])
    for i, row in enumerate(shown):
        draw_scheme(axis, row.bits, values[i], family(row), is_best=i in front, is_filled=row.by == "ours")
    if original is not None:
        draw_original(axis, original)
    if hidden:
        note = ", ".join(f"{row.scheme} ({row.perplexity[text]:.4g})" for row in hidden)
        above = f"above: {note}" if len(hidden) <= MOST_HIDDEN_NAMES else f"{len(hidden)} above"
        axis.text(0.99, 0.98, above, transform=axis.transAxes, fontsize=NAME_SIZE, color=MUTED, ha="right", va="top")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator(TICKS))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.12, y=0.07)
    if name_room is not None:
        low, high = axis.get_xlim()
        axis.set_xlim(low - name_room * (high - low), high)
        ours = [shown[i] for i in front if shown[i].by == "ours"]
        name_schemes(axis, [(row.scheme, row.bits, row.perplexity[text]) for row in ours])
    return [(_method(row), row.bits, row.perplexity[text]) for row in shown if row.by != "ours"]


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
