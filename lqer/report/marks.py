"""Schemes as points of a picture: colour and marker of their family, their names, and the legend of both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from lqer.report.families import FAMILIES, Family

INK, MUTED, PAPER = "#000000", "#555555", "#FFFFFF"
FAINT = 0.55
NAME_SIZE = 6
# Points closer than this, in shares of the axes, share a label; names are wide.
NEAR = (0.12, 0.06)


def draw_scheme(axis: Axes, x: float, y: float, family: Family, *, is_best: bool, is_filled: bool) -> None:
    """A point: large where no other scheme beats it, faint where one does; an open one is light as it is."""
    axis.scatter(
        x,
        y,
        marker=family.marker,
        s=26 if is_best else 16,
        facecolors=family.colour if is_filled else "none",
        edgecolors=family.colour,
        linewidths=0.9,
        alpha=FAINT if is_filled and not is_best else 1,
        zorder=3 if is_best else 2,
    )


def draw_front(axis: Axes, x: Collection[float], y: Collection[float]) -> None:
    axis.plot(list(x), list(y), color=MUTED, linewidth=0.9, zorder=1)


def draw_original(axis: Axes, y: float) -> None:
    axis.axhline(y, color=INK, linewidth=0.8, linestyle="--", zorder=1)


def name_schemes(
    axis: Axes, schemes: Sequence[tuple[str, float, float]], *, colour: str = MUTED, below: bool = True
) -> None:
    """Name points, given as (name, x, y), at their lower left, where a front of falling values leaves room, or at the
    upper right. Neighbours share a label, the lowest first. The axes' scales and limits must be set.
    """
    axis.autoscale_view()
    ordered = sorted(schemes, key=lambda scheme: scheme[1:])
    to_axes = axis.transData + axis.transAxes.inverted()
    groups: list[list[tuple[str, float, float]]] = []
    for scheme in ordered:
        if groups and all(abs(to_axes.transform(scheme[1:]) - to_axes.transform(groups[-1][-1][1:])) < NEAR):
            groups[-1].append(scheme)
        else:
            groups.append([scheme])
    for together in groups:
        upwards = sorted(together, key=lambda scheme: scheme[2])
        name, at = ", ".join(name for name, _, _ in upwards), upwards[0 if below else -1]
        place: dict[str, Any] = {
            "xytext": (-4, -3) if below else (3, 4),
            "textcoords": "offset points",
            "ha": "right" if below else "left",
            "va": "top" if below else "bottom",
        }
        # Above lines, readable where it meets one, below points. A long name must not shrink the panel.
        label = axis.annotate(name, at[1:], fontsize=NAME_SIZE, color=colour, zorder=1.5, in_layout=False, **place)
        label.set_path_effects([withStroke(linewidth=1.5, foreground=PAPER)])


def legend_of(families: Collection[Family], open_means: str = "") -> list[Line2D]:
    """What the points of those families, the front and the original's line are. open_means: of open points, if any."""
    handles = [
        Line2D([], [], color=family.colour, marker=family.marker, linestyle="", markersize=5, label=family.name)
        for family in FAMILIES
        if family in families
    ]
    if open_means:
        label = f"open: {open_means}"
        handles.append(Line2D([], [], color=MUTED, marker="o", markerfacecolor="none", linestyle="", label=label))
    return [
        *handles,
        Line2D([], [], color=MUTED, linewidth=0.9, label="Pareto front"),
        Line2D([], [], color=INK, linewidth=0.8, linestyle="--", label="original"),
    ]
