"""The figures of single linears and decoder blocks: spectra, errors, ranks, losses of optimizations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from lqer.report.families import Family
from lqer.report.kinds import kind_colours, places
from lqer.report.style import PAGE_INCHES, STYLE, panels, save

SMALLEST_SHOWN = 1e-4
# Shades of spectra that belong to no family of schemes.
PLAIN, SCALED = "#999999", "#222222"
MOST_LABELLED_BLOCKS = 24
MOST_LABELLED_LINES = 16
# A model with more kinds of linears, such as one of many experts, has those of one last name in one panel.
MOST_PANELS = 15


def save_singular_values(path: Path, spectra: Mapping[str, np.ndarray], linears: Sequence[str], rank: int) -> None:
    """One panel per linear of a block: the singular values of the rounding error, unscaled and activation-scaled.

    spectra: "<linear>.plain" and "<linear>.scaled", descending; each curve is divided by its own first value.
    """
    with plt.rc_context(STYLE):
        figure, axes, key = panels(len(linears))
        for axis, linear, kind in zip(axes, linears, places(linears)["kind"]):
            for role, shade in (("plain", PLAIN), ("scaled", SCALED)):
                values = spectra[f"{linear}.{role}"]
                axis.plot(np.arange(1, len(values) + 1), values / max(values[0], 1e-30), color=shade)
            if rank:
                axis.axvline(rank, color="#777777", linewidth=0.8, linestyle=":")
            axis.set_title(kind)
            axis.set_ylim(0, 1.05)
            axis.set_xlabel("index")
        axes[0].set_ylabel("singular value / first")
        handles = [
            plt.Line2D([], [], color=PLAIN, label="W − W$_q$"),
            plt.Line2D([], [], color=SCALED, label="(W − W$_q$)·S"),
        ]
        handles += [plt.Line2D([], [], color="#777777", linestyle=":", label=f"rank {rank}")] if rank else []
        key.legend(handles=handles, loc="center")
        figure.suptitle(f"Singular values of the rounding error, {_block(linears)}")
        save(figure, path)


def save_weight_singular_values(path: Path, spectra: Mapping[str, np.ndarray], linears: Sequence[str]) -> None:
    """The singular values of every weight of a block.

    spectra: "<linear>.weight", descending; each curve is divided by its own first value.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.8, 2.8))
        kinds = list(places(linears)["kind"])
        colours = kind_colours(kinds)
        for linear, kind in zip(linears, kinds):
            values = spectra[f"{linear}.weight"]
            axis.plot(np.arange(1, len(values) + 1), values / max(values[0], 1e-30), label=kind, color=colours[kind])
        axis.set_yscale("log")
        # A weight that lacks full rank ends in zeros, which no logarithm shows.
        axis.set_ylim(bottom=SMALLEST_SHOWN)
        axis.set_xlabel("index")
        axis.set_ylabel("singular value / first")
        axis.set_title(f"Singular values of the weights, {_block(linears)}")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        save(figure, path)


def save_step_errors(
    path: Path, errors: Mapping[str, Sequence[float]], step_names: tuple[str, str], error_name: str
) -> None:
    """One panel per kind of linear, one line per decoder block: the relative error after each step of an alternation.

    errors: by linear, after the first and the second step in turns; step_names: what those are.
    """
    kinds: dict[str, dict[int, Sequence[float]]] = {}
    where = places(list(errors))
    for kind, block, values in zip(where["kind"], where["block"], errors.values()):
        kinds.setdefault(kind, {})[block] = values
    blocks = sorted({block for lines in kinds.values() for block in lines})
    with plt.rc_context(STYLE):
        figure, axes, key = panels(len(kinds))
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(blocks)))
        for axis, (kind, lines) in zip(axes, kinds.items()):
            for block, values in lines.items():
                colour = shades[blocks.index(block)]
                for first, style in ((0, "-"), (1, ":")):
                    steps = values[first::2]
                    axis.plot(np.arange(1, len(steps) + 1), steps, style, color=colour, linewidth=1, marker=".")
            axis.set_title(kind)
            axis.set_yscale("log")
            axis.set_xlabel("iteration")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[0].set_ylabel(error_name)
        handles = [
            plt.Line2D([], [], color="#777777", linestyle="-", label=f"after: {step_names[0]}"),
            plt.Line2D([], [], color="#777777", linestyle=":", label=f"after: {step_names[1]}"),
        ]
        ends = sorted({0, len(blocks) - 1})
        handles += [plt.Line2D([], [], color=shades[i], label=f"block {blocks[i]}") for i in ends]
        key.legend(handles=handles, loc="center")
        figure.suptitle("Relative error after each step")
        save(figure, path)


def save_output_errors(path: Path, layers: pd.DataFrame, rounded: Family, reconstructed: Family) -> None:
    """One panel per kind of linear: the relative output error of each, before and after reconstruction, by block.

    rounded, reconstructed: the families of the scheme without and with low-rank factors.
    """
    where = places(list(layers["name"]))
    kinds = where["kind"]
    if kinds.nunique() > MOST_PANELS:
        kinds = kinds.str.rsplit(".", n=1).str[-1]
    table = layers.assign(kind=kinds.to_numpy(), block=where["block"].to_numpy())
    with_factors = bool((layers["rank"] > 0).any())
    curves: list[tuple[str, str, Family, Literal[":", "-"]]] = []
    curves += [("output_error_before", "rounded", rounded, ":")] if with_factors else []
    label = "with low-rank factors" if with_factors else "rounded"
    curves += [("output_error", label, reconstructed, "-")]
    with plt.rc_context(STYLE):
        figure, axes, key = panels(table["kind"].nunique())
        for axis, (kind, rows) in zip(axes, table.groupby("kind", sort=False)):
            # Several linears of one block and kind, as of many experts, are points without a line.
            drawn = rows["block"].is_unique
            for column, _, family, style in curves:
                line = style if drawn else ""
                axis.plot(rows["block"], rows[column], line, marker=".", markersize=4, linewidth=1, color=family.colour)
            axis.set_title(str(kind))
            axis.set_yscale("log")
            axis.set_xlabel("decoder block")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[0].set_ylabel("‖(W − Ŵ)x‖² / ‖Wx‖²")
        handles = [
            plt.Line2D([], [], color=family.colour, linestyle=style, marker=".", label=name)
            for _, name, family, style in curves
        ]
        key.legend(handles=handles, loc="center")
        figure.suptitle("Output error of each linear on calibration inputs")
        save(figure, path)


def save_routing(path: Path, layers: pd.DataFrame, minimum: int) -> None:
    """The output error of every expert's linears over the tokens that the router sent to it.

    minimum: of calibration tokens, marked by a line. An expert that was sent none is drawn at half a token.
    """
    experts = layers[layers["routed_tokens"].notna()]
    kinds = experts["name"].str.rsplit(".", n=1).str[-1]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.8, 2.8))
        for kind, colour in kind_colours(list(kinds)).items():
            rows = experts[kinds == kind]
            tokens = rows["routed_tokens"].astype(float).clip(lower=0.5)
            axis.plot(tokens, rows["output_error"], marker=".", linestyle="", color=colour, label=kind)
        axis.axvline(minimum, color="#777777", linewidth=0.8, linestyle=":", label="calibration.min_expert_tokens")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("calibration tokens sent to the expert")
        axis.set_ylabel("‖(W − Ŵ)x‖² / ‖Wx‖²")
        axis.legend()
        save(figure, path)


def save_block_losses(path: Path, losses: Sequence[Sequence[float]]) -> None:
    """The reconstruction loss of every decoder block, relative to its first value.

    losses: per block the loss at the start and after every round or epoch; that of a round is the mean of its steps.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.8, 2.8))
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
        save(figure, path)


def save_ranks(path: Path, layers: pd.DataFrame, title: str) -> None:
    """The rank of every linear: one row per kind of linear, one column per decoder block.

    The numbers are written into the cells where there is room for them.
    """
    where = places(list(layers["name"]))
    table = pd.DataFrame({"block": where["block"], "kind": where["kind"], "rank": layers["rank"].to_numpy()})
    kinds, blocks = list(dict.fromkeys(table["kind"])), sorted(table["block"].unique())
    ranks = table.pivot(index="kind", columns="block", values="rank").reindex(index=kinds, columns=blocks)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(
            figsize=(min(PAGE_INCHES, max(4.0, 1.8 + 0.3 * len(blocks))), 1.2 + 0.26 * len(kinds))
        )
        image = axis.imshow(ranks.to_numpy(dtype=float), aspect="auto", cmap="viridis", vmin=0)
        figure.colorbar(image, ax=axis, label="rank")
        axis.set_yticks(range(len(kinds)), kinds)
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
        save(figure, path)


def _block(linears: Sequence[str]) -> str:
    """The decoder block of linears by name."""
    return f"block {places(linears)['block'].iloc[0]}"
