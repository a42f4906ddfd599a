"""The charts of a page, as plotly's javascript reads them.

A chart is a dictionary of `data` and `layout`. Colours that follow the reader's light or dark scheme are written as
"var(--ink)" and so on; page.js puts in what page.css defines. Plotly reads markup in every text, so names that come
from outside are escaped.
"""

from __future__ import annotations

import html
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lqer.report.families import FAMILIES, Family
from lqer.report.front import MOST_TIMES_BEST, pareto_front
from lqer.report.kinds import kind_colours, places
from lqer.report.page.points import Candidate, Measure

Chart = dict[str, Any]

INK, MUTED, GRID = "var(--ink)", "var(--muted)", "var(--grid)"
# Values that span more than this factor are shown on a logarithmic axis.
LOG_SPAN = 3
# Points of a curve: more than a screen has columns are not seen.
MOST_POINTS = 300
HOVER_WIDTH = 58
# Room at the ends of an axis.
PADDING = 0.07
# The shortest axis of costs, as a share of its middle: candidates of the same size stand above each other.
LEAST_SPAN = 0.25
# Numbers on a logarithmic axis, as multiples of powers of ten: the first choice that is not too many.
STEPS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
MOST_TICKS, MOST_BAR_TICKS, MOST_BLOCK_TICKS = 9, 6, 12
SMALLEST_SHOWN = 1e-4
SIZE_OF_MARKER, SIZE_ON_FRONT = 9, 12
# Below this distance, a share of the span of costs, the names of two points would overlap.
NEIGHBOUR = 0.05
# Right of a point, for its name.
NAME_ROOM = 0.15


class Cost(NamedTuple):
    """What a candidate takes up, the axis of a Pareto chart."""

    title: str
    of: Callable[[Candidate], float | None]


COSTS = (
    Cost("average bits per weight", lambda one: one.bits),
    Cost("size of the checkpoint, GB", lambda one: one.size),
)


def pareto(candidates: Sequence[Candidate], measure: Measure, original: float | None, cost: Cost = COSTS[0]) -> Chart:
    """A measure over a cost, one trace per family, with the fronts of what no other candidate beats.

    A candidate is beaten by one that rounds activations to at most as many bits, as in a ranking; one front is drawn
    for each width of activations, and names what is on it. customdata of a point is the place of its candidate in
    `candidates`. Ruined models are above the axis until a double click shows all.
    """
    costs = {i: at for i, one in enumerate(candidates) if measure in one.values and (at := cost.of(one)) is not None}
    values = [candidates[i].values[measure] for i in costs]
    fronts = _fronts(candidates, costs, measure)
    names = _front_names(candidates, costs, fronts)
    data = [_family(family, candidates, costs, names, measure) for family in FAMILIES]
    data = [trace for trace in data if trace["x"]]
    for activation, members in reversed(fronts.items()):
        if len(members) > 1:
            data.insert(0, _front(activation, [(costs[i], candidates[i].values[measure]) for i in members]))
    layout = _layout(cost.title, html.escape(measure.quantity))
    everything = [*values, *([] if original is None else [original])]
    above = 0
    if measure.quantity == "perplexity":
        limit = MOST_TIMES_BEST * (min(everything, default=1) if original is None else original)
        above = sum(value > limit for value in everything)
        everything = [value for value in everything if value <= limit]
    layout["xaxis"]["range"] = axis_range(list(costs.values()), LEAST_SPAN)
    layout["yaxis"] |= axis_scale(everything)
    layout["annotations"] = []
    if above:
        layout["annotations"].append(
            {"xref": "paper", "yref": "paper", "x": 1, "xanchor": "right", "y": 1, "yanchor": "top",
             "showarrow": False, "text": f"{above} above {limit:.3g}",
             "font": {"color": MUTED, "size": 11}}
        )  # fmt: skip
    if original is not None:
        layout["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": original, "y1": original,
             "line": {"color": INK, "width": 1, "dash": "dash"}}
        ]  # fmt: skip
        # An annotation's place on a logarithmic axis is the exponent.
        place = math.log10(original) if layout["yaxis"].get("type") == "log" else original
        layout["annotations"].append(
            {"xref": "paper", "x": 0, "xanchor": "left", "y": place, "yanchor": "top", "showarrow": False,
             "text": f"original {original:.4g}", "font": {"color": INK, "size": 11}}
        )  # fmt: skip
    layout["hovermode"] = "closest"
    return {"data": data, "layout": layout}


def axis_range(values: Sequence[float], least: float = 0.0) -> list[float]:
    """The ends of an axis: the values with room for markers on both sides, at least that share of where they are."""
    low, high = min(values, default=0), max(values, default=1)
    room = max(PADDING * (high - low), least * (low + high) / 4 - (high - low) / 2) or 0.5
    return [low - room, high + room]


def axis_scale(values: Sequence[float]) -> dict[str, Any]:
    """The layout of a measure's axis: logarithmic where the values span a wide range."""
    low, high = min(values, default=0), max(values, default=1)
    if low <= 0 or high <= LOG_SPAN * low:
        return {"range": axis_range(values)}
    ends = axis_range([math.log10(low), math.log10(high)])
    ticks = _ticks(ends[0], ends[1])
    return {"type": "log", "range": ends, **ticks, "tickvals": [10**at for at in ticks["tickvals"]]}


def _ticks(low: float, high: float, most: int = MOST_TICKS) -> dict[str, Any]:
    """The ticks of an axis over logarithms: powers of ten and, the fewer there are, the more numbers between them."""
    for steps in STEPS:
        ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
        if len(ticks) <= most:
            break
    return {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]}


def _family(
    family: Family,
    candidates: Sequence[Candidate],
    costs: Mapping[int, float],
    front: Mapping[int, str],
    measure: Measure,
) -> dict[str, Any]:
    """The points of one family: faint where another candidate beats them, open where activations are rounded too.

    front: the names of the candidates that no other beats, by their places.
    """
    members = [i for i in costs if candidates[i].family is family]
    is_open = [candidates[i].rounds_activations for i in members]
    # The names of open points stand above them, at the right but for the last.
    low, high = min(costs.values(), default=0), max(costs.values(), default=0)
    above = ["top right" if costs[i] <= high - NAME_ROOM * (high - low) else "top left" for i in members]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": family.name,
        "x": [costs[i] for i in members],
        "y": [candidates[i].values[measure] for i in members],
        "text": [html.escape(front.get(i, "")) for i in members],
        "textposition": [side if rounded else "bottom left" for side, rounded in zip(above, is_open)],
        "textfont": {"color": INK, "size": 11},
        "cliponaxis": False,
        "customdata": members,
        "hoverinfo": "text",
        "hovertext": [hover(candidates[i], measure) for i in members],
        "meta": [short_hover(candidates[i], measure) for i in members],
        "marker": {
            "color": family.colour,
            "symbol": [family.symbol + ("-open" if rounded else "") for rounded in is_open],
            "size": [SIZE_ON_FRONT if i in front else SIZE_OF_MARKER for i in members],
            "opacity": [1 if i in front else 0.6 for i in members],
            "line": {"width": [2 if rounded else 1 for rounded in is_open]},
        },
    }


def _front_names(
    candidates: Sequence[Candidate], costs: Mapping[int, float], fronts: Mapping[str, Sequence[int]]
) -> dict[int, str]:
    """What to write beside each candidate of a front: its run, without what all tags begin with.

    Nothing beside one that has a better neighbour, where names would lie above each other, and on the page of one run.
    """
    words = [one.tag.split("-") for one in candidates]
    shared = sum(1 for _ in itertools.takewhile(lambda together: len(set(together)) == 1, zip(*words)))
    span = max(costs.values(), default=0) - min(costs.values(), default=0)
    names: dict[int, str] = {}
    for members in fronts.values():
        for i, following in zip(members, [*members[1:], None]):
            is_crowded = following is not None and costs[following] - costs[i] < NEIGHBOUR * span
            names[i] = "" if is_crowded else "-".join(words[i][shared:])
    return names


def _fronts(candidates: Sequence[Candidate], costs: Mapping[int, float], measure: Measure) -> dict[str, list[int]]:
    """The places of candidates that no other beats, by rising cost, for each format of activations."""
    fronts: dict[str, list[int]] = {}
    for own in sorted({candidates[i].activation_bits for i in costs}, reverse=True):
        rivals = [i for i in costs if candidates[i].activation_bits <= own]
        values = [candidates[i].values[measure] for i in rivals]
        best = pareto_front([costs[i] for i in rivals], values, measure.lower_is_better)
        members = [rivals[place] for place in best if candidates[rivals[place]].activation_bits == own]
        names = dict.fromkeys(candidates[i].activation for i in costs if candidates[i].activation_bits == own)
        fronts[", ".join(names)] = members
    return fronts


def _front(activation: str, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    is_plain = activation == "none"
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front" if is_plain else f"with {html.escape(activation)}",
        "x": [cost for cost, _ in points],
        "y": [value for _, value in points],
        "hoverinfo": "skip",
        "line": {"color": MUTED, "width": 1.5, "dash": "solid" if is_plain else "dot"},
    }


def hover(one: Candidate, measure: Measure) -> str:
    """The text beside a point: scheme, bits in parts, the value with its protocol, the command that repeats it."""
    parts = " + ".join(f"{value:.3f} {name}" for name, value in one.parts.items())
    lines = [
        f"{one.scheme} · {one.tag}",
        f"weights {one.weight}, activations {one.activation}, rank {one.rank}",
        f"{one.bits:.3f} bits = {parts}" + ("" if one.size is None else f"; {one.size:.3g} GB"),
        f"{measure.title}: {one.values[measure]:.5g}",
        one.command,
    ]
    wrapped = [part for line in lines for part in textwrap.wrap(line, HOVER_WIDTH) or [""]]
    return "<br>".join(html.escape(line) for line in wrapped)


def short_hover(one: Candidate, measure: Measure) -> str:
    """The same for a screen that is too narrow for it: the page lists the rest below the chart."""
    lines = [*textwrap.wrap(one.scheme, 22)[:2], f"{one.bits:.2f} bits: {one.values[measure]:.4g}"]
    return "<br>".join(html.escape(line) for line in lines)


def heat_map(layers: pd.DataFrame, column: str, unit: str, logarithmic: bool = False) -> Chart:
    """A column of layers.csv by kind of linear and decoder block."""
    where = places(list(layers["name"]))
    table = pd.DataFrame(
        {"kind": where["kind"], "block": where["block"], "value": layers[column].to_numpy(dtype=float)}
    )
    kinds, blocks = list(dict.fromkeys(table["kind"])), sorted(table["block"].unique())
    values = table.pivot(index="kind", columns="block", values="value").reindex(index=kinds, columns=blocks).to_numpy()
    shown = np.log10(np.where(values > 0, values, np.nan)) if logarithmic else values
    bar: dict[str, Any] = {
        "orientation": "h", "y": -0.32, "yanchor": "top", "thickness": 12, "len": 1, "outlinewidth": 0,
    }  # fmt: skip
    if logarithmic and np.isfinite(shown).any():
        bar |= _ticks(float(np.nanmin(shown)), float(np.nanmax(shown)), MOST_BAR_TICKS)
    layout = _layout("decoder block", "")
    # Left to itself, an axis of few blocks has ticks at halves of them.
    ticks = {"dtick": 1} if len(blocks) <= MOST_BLOCK_TICKS else {"nticks": MOST_BLOCK_TICKS}
    layout["xaxis"] |= {"showgrid": False, **ticks}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "type": "category", "ticks": ""}
    layout["margin"]["b"] = 90
    heat = {
        "type": "heatmap",
        "x": [int(block) for block in blocks],
        "y": [html.escape(kind) for kind in kinds],
        "z": _numbers(shown),
        "text": [[None if math.isnan(v) else f"{v:.4g}" for v in row] for row in values.tolist()],
        "hovertemplate": f"%{{y}}, block %{{x}}<br>%{{text}} {html.escape(unit)}<extra></extra>",
        "colorscale": "Viridis",
        "xgap": 1,
        "ygap": 1,
        "colorbar": bar,
    }
    return {"data": [heat], "layout": layout}


def block_losses(losses: Sequence[Sequence[float]]) -> Chart:
    """The reconstruction loss of every decoder block after every round or epoch, relative to its first value."""
    layout = _layout("round or epoch", "block loss / its first value")
    layout["yaxis"]["type"] = "log"
    layout["showlegend"] = False
    layout["hovermode"] = "closest"
    data = [
        _curve(f"block {block}", _shade(block, len(losses)), range(len(values)), np.asarray(values) / (values[0] or 1))
        for block, values in enumerate(losses)
        if values
    ]
    return {"data": data, "layout": layout}


def finetune_losses(losses: Sequence[float], original: float, best_epoch: int) -> Chart:
    """The held-out loss before fine-tuning and after every epoch, above that of the original model."""
    layout = _layout("epoch", "held-out loss, nats per token")
    layout["xaxis"]["dtick"] = max(1, len(losses) // 10)
    epochs = list(range(len(losses)))
    best = {
        "type": "scatter", "mode": "markers", "name": "evaluated", "x": [best_epoch], "y": [losses[best_epoch]],
        "marker": {"size": SIZE_ON_FRONT, "symbol": "circle-open", "color": INK, "line": {"width": 2}},
    }  # fmt: skip
    level = {
        "type": "scatter", "mode": "lines", "name": "original model", "x": [epochs[0], epochs[-1]],
        "y": [original, original], "line": {"color": INK, "width": 1, "dash": "dash"},
    }  # fmt: skip
    return {"data": [_curve("quantized", "#0072B2", epochs, losses), best, level], "layout": layout}


def spectra(curves: Mapping[str, np.ndarray], linears: Sequence[str], role: str) -> Chart:
    """Singular values of every linear of a block, relative to the first.

    curves: "<linear>.<role>", descending. role: "plain", "scaled" (errors of rounding) or "weight".
    """
    kinds = list(places(linears)["kind"])
    colours = kind_colours(kinds)
    layout = _layout("index", "singular value / first")
    layout["yaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1}
    data = []
    for linear, kind in zip(linears, kinds, strict=True):
        values = curves[f"{linear}.{role}"]
        kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).round().astype(int))
        # A weight that lacks full rank ends in zeros, which no logarithm shows.
        relative = np.maximum(values[kept] / max(float(values[0]), 1e-30), SMALLEST_SHOWN)
        data.append(_curve(html.escape(kind), colours[kind], kept + 1, relative))
        data[-1]["mode"] = "lines"
    return {"data": data, "layout": layout}


def _curve(name: str, colour: str, x: Any, y: Any) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": [int(value) for value in x],
        "y": [float(f"{value:.5g}") for value in y], "line": {"color": colour, "width": 1.5}, "marker": {"size": 4},
    }  # fmt: skip


def _shade(index: int, count: int) -> str:
    """The color of a decoder block's line, from blue in the first to yellow-green in the last."""
    share = index / max(count - 1, 1)
    return f"hsl({250 - 170 * share:.0f}, 65%, {45 + 8 * share:.0f}%)"


def _numbers(values: np.ndarray) -> list[list[float | None]]:
    return [[float(f"{value:.5g}") if math.isfinite(value) else None for value in row] for row in values.tolist()]


def _layout(x: str, y: str) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "linecolor": MUTED, "zeroline": False, "automargin": True, "ticks": "outside",
            "tickcolor": MUTED}  # fmt: skip
    return {
        "template": {},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 4}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "hoverlabel": {"align": "left", "bgcolor": "var(--panel)", "bordercolor": MUTED,
                       "font": {"color": INK, "size": 12}},
    }  # fmt: skip
