"""The figures of a report: spectra of weights and errors, optimization losses, ranks, perplexities.

Colours are of the Okabe-Ito palette, which stays apart for colour-blind readers; the same model kind has the same
colour in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lqer.results import PerplexityRow

COLOURS = {"original": "#000000", "rtn": "#D55E00", "quantized": "#0072B2"}
# For more curves than kinds of models.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
SMALLEST_SHOWN = 1e-4
DPI = 130
LOG_SPAN = 3
MOST_LABELLED_BLOCKS = 40
MOST_LABELLED_LINES = 16
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


def save_singular_values(path: Path, spectra: Mapping[str, np.ndarray], linears: Sequence[str], rank: int) -> None:
    """One panel per linear of a block: the singular values of the rounding error, unscaled and activation-scaled.

    spectra: "<linear>.plain" and "<linear>.scaled", descending; each curve is divided by its own first value.
    """
    columns = min(4, len(linears))
    rows = -(-len(linears) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, 2.2 * rows), sharey=True, squeeze=False)
        for axis, linear in zip(axes.flat, linears):
            for kind, label, colour in (
                ("plain", "W − W$_q$", COLOURS["rtn"]),
                ("scaled", "(W − W$_q$)·S", COLOURS["quantized"]),
            ):
                values = spectra[f"{linear}.{kind}"]
                axis.plot(np.arange(1, len(values) + 1), values / max(values[0], 1e-30), label=label, color=colour)
            if rank:
                axis.axvline(rank, color="#777777", linewidth=0.8, linestyle=":")
                axis.annotate(f"rank {rank}", (rank, 0.97), xytext=(3, 0), textcoords="offset points", fontsize=7)
            axis.set_title(".".join(linear.split(".")[-2:]))
            axis.set_ylim(0, 1.05)
        for axis in axes.flat[len(linears) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("index")
        axes[0][0].set_ylabel("singular value / first")
        axes[0][0].legend(loc="upper right")
        block = linears[0].rsplit(".", 2)[0]
        figure.suptitle(f"Singular values of the rounding error, {block}", fontsize=10)
        _save(figure, path)


def save_weight_singular_values(path: Path, spectra: Mapping[str, np.ndarray], linears: Sequence[str]) -> None:
    """The singular values of every weight of a block.

    spectra: "<linear>.weight", descending; each curve is divided by its own first value.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3.2))
        for linear, colour in zip(linears, PALETTE * len(linears)):
            values = spectra[f"{linear}.weight"]
            label = ".".join(linear.split(".")[-2:])
            axis.plot(np.arange(1, len(values) + 1), values / max(values[0], 1e-30), label=label, color=colour)
        axis.set_yscale("log")
        # A weight that lacks full rank ends in zeros, which no logarithm shows.
        axis.set_ylim(bottom=SMALLEST_SHOWN)
        axis.set_xlabel("index")
        axis.set_ylabel("singular value / first")
        axis.set_title(f"Singular values of the weights, {linears[0].rsplit('.', 2)[0]}")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        _save(figure, path)


def save_step_errors(
    path: Path, errors: Mapping[str, Sequence[float]], step_names: tuple[str, str], error_name: str
) -> None:
    """One panel per kind of linear, one line per decoder block: the relative error after each step of an alternation.

    errors: by linear, after the first and the second step in turns; step_names: what those are.
    """
    kinds: dict[str, dict[int, Sequence[float]]] = {}
    places = _places(pd.Series(list(errors)))
    for kind, block, values in zip(places["kind"], places["block"], errors.values()):
        kinds.setdefault(kind, {})[block] = values
    blocks = sorted({block for lines in kinds.values() for block in lines})
    # One panel more, for the legend.
    columns = min(4, len(kinds) + 1)
    rows = -(-(len(kinds) + 1) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, 2.2 * rows), sharey=True, squeeze=False)
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(blocks)))
        for axis, (kind, lines) in zip(axes.flat, kinds.items()):
            for block, values in lines.items():
                colour = shades[blocks.index(block)]
                for first, style in ((0, "-"), (1, ":")):
                    steps = values[first::2]
                    axis.plot(np.arange(1, len(steps) + 1), steps, style, color=colour, linewidth=1, marker=".")
            axis.set_title(kind)
            axis.set_yscale("log")
            axis.set_xlabel("iteration")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for axis in axes.flat[len(kinds) :]:
            axis.set_axis_off()
        axes[0][0].set_ylabel(error_name)
        handles = [
            plt.Line2D([], [], color="#777777", linestyle="-", label=f"after: {step_names[0]}"),
            plt.Line2D([], [], color="#777777", linestyle=":", label=f"after: {step_names[1]}"),
        ]
        handles += [plt.Line2D([], [], color=shades[i], label=f"block {blocks[i]}") for i in (0, len(blocks) - 1)]
        axes.flat[len(kinds)].legend(handles=handles, loc="center")
        figure.suptitle("Relative error after each step", fontsize=10)
        _save(figure, path)


def save_output_errors(path: Path, layers: pd.DataFrame) -> None:
    """Relative output error of every linear, before and after reconstruction, in the order of the model."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3))
        x = np.arange(len(layers))
        reconstructed = bool((layers["rank"] > 0).any())
        if reconstructed:
            axis.scatter(x, layers["output_error_before"], s=9, color=COLOURS["rtn"], label="rounded")
        label = "with low-rank reconstruction" if reconstructed else "rounded"
        axis.scatter(x, layers["output_error"], s=9, color=COLOURS["quantized"], label=label)
        axis.set_yscale("log")
        axis.set_ylabel("‖(W − Ŵ)x‖² / ‖Wx‖²")
        axis.set_xlabel("linear, in the order of the model")
        axis.set_title("Output error of each linear on calibration inputs")
        axis.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.08), borderaxespad=0)
        _save(figure, path)


def save_block_losses(path: Path, losses: Sequence[Sequence[float]]) -> None:
    """The reconstruction loss of every decoder block, relative to its first value.

    losses: per block the loss at the start and after every round or epoch; that of a round is the mean of its steps.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3.2))
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(losses)))
        for index, (values, shade) in enumerate(zip(losses, shades, strict=True)):
            relative = np.asarray(values) / max(values[0], 1e-30)
            axis.plot(relative, color=shade, linewidth=1.2, marker=".", markersize=3, label=f"{index}")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.2g}")
        axis.yaxis.set_minor_formatter("{x:.2g}")
        axis.set_xlabel("round or epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_ylabel("block loss / its first value")
        if len(losses) <= MOST_LABELLED_LINES:
            axis.legend(title="block", ncols=1 + len(losses) // 9, loc="center left", bbox_to_anchor=(1.01, 0.5))
        else:
            scale = plt.cm.ScalarMappable(plt.Normalize(0, len(losses) - 1), "viridis")
            figure.colorbar(scale, ax=axis, label="decoder block")
        _save(figure, path)


def save_ranks(path: Path, layers: pd.DataFrame, title: str) -> None:
    """The rank of every linear: one row per kind of linear, one column per decoder block.

    The numbers are written into the cells where there is room for them.
    """
    places = _places(layers["name"])
    table = layers.assign(block=places["block"], kind=places["kind"])
    kinds, blocks = list(dict.fromkeys(table["kind"])), sorted(table["block"].unique())
    ranks = table.pivot(index="kind", columns="block", values="rank").reindex(index=kinds, columns=blocks)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(max(5.0, 2.5 + 0.32 * len(blocks)), 1.4 + 0.32 * len(kinds)))
        image = axis.imshow(ranks.to_numpy(dtype=float), aspect="auto", cmap="viridis", vmin=0)
        figure.colorbar(image, ax=axis, label="rank")
        axis.set_yticks(range(len(kinds)), [kind.removeprefix("self_attn.").removeprefix("mlp.") for kind in kinds])
        shown = range(0, len(blocks), -(-len(blocks) // 16))
        axis.set_xticks(list(shown), [str(blocks[i]) for i in shown])
        axis.set_xlabel("decoder block")
        axis.set_title(title)
        if len(blocks) <= MOST_LABELLED_BLOCKS:
            middle = float(np.nanmax(ranks.to_numpy(dtype=float))) / 2
            for (row, column), rank in np.ndenumerate(ranks.to_numpy(dtype=float)):
                if np.isfinite(rank):
                    colour = "white" if rank < middle else "black"
                    axis.text(column, row, f"{rank:.0f}", ha="center", va="center", fontsize=6, color=colour)
        _save(figure, path)


def _places(names: pd.Series) -> pd.DataFrame:
    """The decoder block of each linear, and its name within the block."""
    return names.str.extract(r"\.(?P<block>\d+)\.(?P<kind>.+)$").astype({"block": int})


def save_perplexities(
    path: Path, rows: Sequence[PerplexityRow], names: Mapping[str, str], bits: Mapping[str, float]
) -> None:
    """One group of bars per dataset: original, RTN if evaluated, quantized, labelled by `names`."""
    kinds = [kind for kind in COLOURS if any(row[kind] is not None for row in rows)]  # type: ignore[literal-required]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(max(4.0, 1.6 + 1.8 * len(rows)), 3))
        width = 0.8 / len(kinds)
        for k, kind in enumerate(kinds):
            values = [row[kind] if row[kind] is not None else np.nan for row in rows]  # type: ignore[literal-required]
            label = f"{names[kind]}, {bits[kind]:.2f} bits" if kind in bits else names[kind]
            places = np.arange(len(rows)) + (k - (len(kinds) - 1) / 2) * width
            bars = axis.bar(places, values, width * 0.92, label=label, color=COLOURS[kind])
            axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axis.set_xticks(
            np.arange(len(rows)), [f"{row['dataset']}\n{row['protocol']}, {row['seq_len']}" for row in rows]
        )
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("perplexity (lower is better)")
        axis.margins(y=0.15)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.02), borderaxespad=0)
        _save(figure, path)


def save_pareto(path: Path, table: pd.DataFrame, title: str) -> None:
    """Perplexity over average bits, one point per run, with the Pareto front.

    A baseline without low-rank factors, where a run evaluated it, is a point of its own. The perplexity axis is
    logarithmic once it spans more than a factor of LOG_SPAN.
    """
    points = _with_baseline_points(table)
    original = table["original"].dropna()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 4))
        for colour, (method, group) in zip(PALETTE[:-1] * 3, points.groupby("method")):
            axis.scatter(group["bits"], group["perplexity"], label=method, color=colour, s=22, zorder=3)
        front = pareto_front(points)
        axis.plot(front["bits"], front["perplexity"], color="#777777", linewidth=1, zorder=2, label="Pareto front")
        if len(original):
            axis.axhline(original.iloc[0], color="#000000", linewidth=0.8, linestyle="--", label="original")
        lowest = min(points["perplexity"].min(), original.min() if len(original) else np.inf)
        if points["perplexity"].max() > LOG_SPAN * lowest:
            axis.set_yscale("log")
        axis.set_xlabel("average bits per weight, low rank and metadata included")
        axis.set_ylabel("perplexity")
        axis.set_title(title)
        axis.legend()
        _save(figure, path)


def _with_baseline_points(table: pd.DataFrame) -> pd.DataFrame:
    points = table[["method", "bits", "perplexity"]]
    rtn = table[["rtn_method", "rtn_bits", "rtn"]].dropna().drop_duplicates().set_axis(points.columns, axis="columns")
    return pd.concat([points, rtn], ignore_index=True).drop_duplicates()


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """The rows on the Pareto front (no other row has at most the bits and less perplexity), by increasing bits."""
    ordered = points.dropna(subset=["bits", "perplexity"]).sort_values(["bits", "perplexity"])
    return ordered[ordered["perplexity"] < ordered["perplexity"].cummin().shift(fill_value=np.inf)]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
