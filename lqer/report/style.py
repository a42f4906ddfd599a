"""The style of the PNG figures: sizes for a paper's page, panels with a place for their legend, how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Dots per inch that journals ask of a figure with text.
DPI = 300
# The width of a paper's page between its margins.
PAGE_INCHES = 7.2
MOST_COLUMNS = 4
PANEL_INCHES = (PAGE_INCHES / MOST_COLUMNS, 1.7)
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def panels(count: int) -> tuple[Figure, list[Axes], Axes]:
    """A figure of `count` panels with one y axis, in rows; the last value is an empty panel for the legend."""
    columns = min(MOST_COLUMNS, count + 1)
    rows = -(-(count + 1) // columns)
    width, height = PANEL_INCHES
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows + 0.3), sharey=True, squeeze=False
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count]), axes.flat[count]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that holds every label, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
