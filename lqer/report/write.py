"""Writes a run's folder: results.json, layers.csv, report.md, report.html, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lqer.checkpoint.bits import Bits, named_parts
from lqer.report import figures, layer_figures
from lqer.report.experts import experts_paragraphs
from lqer.report.families import family_of, rtn_family
from lqer.report.naming import own_rounding, rtn_name, scheme_name, weights_name
from lqer.report.page.write import PAGE_FILE, Details, write_run_page
from lqer.report.paragraphs import (
    allocation_paragraphs,
    block_paragraphs,
    damping_paragraphs,
    decode_paragraphs,
    divergence_paragraphs,
    export_paragraphs,
    finetune_paragraphs,
    shown_calibration,
    widths_paragraphs,
)
from lqer.report.published import figures_of
from lqer.results import RESULTS_FILE, ModelInfo, PerplexityRow, Results
from lqer.store.files import write_atomically, write_json, write_text
from lqer.store.names import layers_file, spectra_file, tuning_file
from lqer.store.store import Artifact

LAYERS_FILE = "layers.csv"
REPORT_FILE = "report.md"
PERPLEXITY_FIGURE = "figures/perplexity.png"
ERROR_FIGURE = "figures/output_error.png"
SPECTRA_FIGURE = "figures/singular_values.png"
WEIGHT_SPECTRA_FIGURE = "figures/weight_singular_values.png"
STEPS_FIGURE = "figures/step_errors.png"
RANKS_FIGURE = "figures/ranks.png"
LOSSES_FIGURE = "figures/block_loss.png"
ROUTING_FIGURE = "figures/routing.png"

STEP_ERROR = "√(tr(F H Fᵀ) / tr(W H Wᵀ))"


def layer_rows(checkpoint: Artifact, blocks: int) -> list[dict[str, Any]]:
    """The per-linear rows that the quantize stage left, in the order of the model."""
    return [row for index in range(blocks) for row in checkpoint.json(layers_file(index))]


def layers_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """layers.csv: one row per linear; bits per original weight, errors relative."""
    table = pd.DataFrame(rows)
    weights = table["out_features"] * table["in_features"]
    codebooks, low_rank = table["codebook_bits"], table["low_rank_bits"]
    layers = pd.DataFrame(
        {
            "name": table["name"],
            "out_features": table["out_features"],
            "in_features": table["in_features"],
            "rank": table["rank"],
            "bits": (table["weight_bits"] + table["metadata_bits"] + low_rank) / weights,
            "code_bits": table["weight_bits"] / weights,
            "codebook_bits": codebooks / weights,
            "scale_bits": (table["metadata_bits"] - codebooks - table["zero_bits"] - table["sign_bits"]) / weights,
            "zero_bits": table["zero_bits"] / weights,
            "sign_bits": table["sign_bits"] / weights,
            "low_rank_bits": low_rank / weights,
            "captured_energy": table["captured_energy"],
            "solver_gap": table["solver_gap"],
            "damping_raises": table["damping_raises"],
            "weight_error_before": table["weight_error_before"],
            "weight_error": table["weight_error"],
            "output_error_before": table["output_error_before"],
            "output_error": table["output_error"],
        }
    )
    if "routed_tokens" not in table:
        return layers
    # Only experts have them.
    return layers.assign(routed_tokens=table["routed_tokens"].astype("Int64"))


def draw_figures(
    folder: Path, results: Results, rows: Sequence[Mapping[str, Any]], checkpoint: Artifact, blocks: int
) -> None:
    """Save every figure of the report."""
    layers = layers_table(rows)
    if spectra := _spectra(checkpoint, blocks):
        shown = layers[layers["name"].isin({name.rpartition(".")[0] for name in spectra})]
        layer_figures.save_singular_values(
            folder / SPECTRA_FIGURE, spectra, list(shown["name"]), int(shown["rank"].max())
        )
        layer_figures.save_weight_singular_values(folder / WEIGHT_SPECTRA_FIGURE, spectra, list(shown["name"]))
    families = {"rtn": rtn_family(results["config"]), "quantized": family_of(results["config"])}
    layer_figures.save_output_errors(folder / ERROR_FIGURE, layers, families["rtn"], families["quantized"])
    step_errors = _step_errors(rows)
    if step_errors:
        names = ("reconstruct", "round")
        names = names if results["config"]["quantize"]["method"].get("starts_with") != "round" else names[::-1]
        layer_figures.save_step_errors(folder / STEPS_FIGURE, step_errors, names, STEP_ERROR)
    if results["allocation"] is not None:
        title = f"Ranks within {results['config']['quantize']['low_rank']['budget_bits']:g} bits per weight"
        layer_figures.save_ranks(folder / RANKS_FIGURE, layers, title)
    if results["experts"] is not None:
        layer_figures.save_routing(
            folder / ROUTING_FIGURE, layers, results["config"]["calibration"]["min_expert_tokens"]
        )
    notes = block_notes(checkpoint, blocks)
    if any(_losses(note) for note in notes):
        layer_figures.save_block_losses(folder / LOSSES_FIGURE, [_losses(note) for note in notes])
    if _has_perplexity(results):
        candidates = _kind_names(results)
        if not results["bits"]["low_rank"]:
            # A scheme without factors is its own baseline.
            del candidates["rtn"]
        figures.save_perplexities(
            folder / PERPLEXITY_FIGURE, results["perplexity"], candidates, _bits_by_kind(results), families
        )


def write_page(
    folder: Path, results: Results, rows: Sequence[Mapping[str, Any]], checkpoint: Artifact, blocks: int
) -> None:
    """Write report.html."""
    losses = [_losses(note) for note in block_notes(checkpoint, blocks)]
    write_run_page(folder / PAGE_FILE, results, Details(layers_table(rows), losses, _spectra(checkpoint, blocks)))


def write_tables(
    folder: Path, results: Results, rows: Sequence[Mapping[str, Any]], checkpoint: Artifact, blocks: int
) -> None:
    """Write layers.csv, report.md and, last, results.json, whose presence marks a complete run."""
    layers = layers_table(rows)
    write_atomically(folder / LAYERS_FILE, lambda temporary: layers.to_csv(temporary, index=False, float_format="%.6g"))
    spectra, notes = _spectra(checkpoint, blocks), block_notes(checkpoint, blocks)
    text = render_report(results, layers, bool(spectra), bool(_step_errors(rows)), notes)
    write_text(folder / REPORT_FILE, text)
    write_json(folder / RESULTS_FILE, results)


def _spectra(checkpoint: Artifact, blocks: int) -> dict[str, np.ndarray]:
    """The singular values that were measured in the middle block; empty if they were not."""
    middle = spectra_file(blocks // 2)
    return {name: tensor.numpy() for name, tensor in checkpoint.tensors(middle).items()} if middle in checkpoint else {}


def _step_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The errors after every step of an alternation, by linear; empty for other methods."""
    return {row["name"]: row["step_errors"] for row in rows if row["step_errors"]}


def block_notes(checkpoint: Artifact, blocks: int) -> list[dict[str, Any]]:
    """The notes of block reconstruction, one per block; empty without it."""
    return [checkpoint.json(tuning_file(i)) for i in range(blocks) if tuning_file(i) in checkpoint]


def _losses(note: Mapping[str, Any]) -> list[float]:
    """The losses of a block's optimization: at the start, after every round, at the end."""
    loss = note.get("loss", {})
    if "rounds" in loss:
        return [loss["start"], *loss["rounds"], loss["end"]]
    return list(note.get("lwc", []))


def _has_perplexity(results: Results) -> bool:
    return any(row["quantized"] is not None or row["original"] is not None for row in results["perplexity"])


def _bits_by_kind(results: Results) -> dict[str, float]:
    bits = {"quantized": results["bits"]["average"]}
    if results["baseline"] is not None:
        bits["rtn"] = results["baseline"]["bits"]["average"]
    return bits


def _kind_names(results: Results) -> dict[str, str]:
    quantize = results["config"]["quantize"]
    return {"original": "original", "rtn": rtn_name(quantize), "quantized": scheme_name(quantize)}


def shown_model(model: ModelInfo) -> str:
    """What was quantized, and in a second line what is known of it beyond its name, such as where it comes from."""
    name, description = model["name"], model["description"]
    share = model["quantized_parameters"] / max(model["parameters"], 1)
    # A model of the hub is described by its name and commit, a folder or a file by the last part of its path.
    told = description if description.startswith(name) else name
    about = "" if description.endswith(Path(told).name) else f"\n{description}"
    return (
        f"{told} ({model['architecture']}, {model['parameters'] / 1e6:.1f}M parameters; {share:.0%} of them quantized)."
        f"{about}"
    )


def summary_table(results: Results) -> str:
    """The table printed at the end of a run: one row per evaluation, one column per candidate (markdown)."""
    kinds = ["original", *(["rtn"] if results["baseline"] is not None else []), "quantized"]
    names = _kind_names(results)
    bits = _bits_by_kind(results)
    lines = [
        "| | " + " | ".join(names[kind] for kind in kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
        "| bits per quantized weight | "
        + " | ".join(f"{bits[kind]:.3f}" if kind in bits else "–" for kind in kinds)
        + " |",
    ]
    for row in results["perplexity"]:
        label = f"perplexity, {row['dataset']} ({row['protocol']}, seq_len {row['seq_len']}, {row['tokens']} tokens)"
        lines.append(f"| {label} | " + " | ".join(_number(row.get(kind), 4) for kind in kinds) + " |")
        lines += _divergence_lines(row, kinds)
    for task in results["downstream"]:
        label = f"{task['task']} {task['metric']} ({task['num_fewshot']}-shot, {task['samples']} samples)"
        lines.append(f"| {label} | " + " | ".join(_number(task.get(kind), 4) for kind in kinds) + " |")
    return "\n".join(lines)


# Keys of `Divergence` and what a table calls them.
DIVERGENCE_ROWS = {
    "kl_mean": "KL from the original, mean",
    "kl_p99": "KL from the original, 99th percentile",
    "top1_agreement": "top-1 agreement with the original",
}


def _divergence_lines(row: PerplexityRow, kinds: Sequence[str]) -> list[str]:
    """Rows of the table: none without divergence, and no value of the original, whose distance from itself is 0."""
    found = row["divergence"]
    if found is None:
        return []
    values: dict[str, Mapping[str, Any]] = {"rtn": found["rtn"] or {}, "quantized": found["quantized"]}
    protocol = f"{row['protocol']}, seq_len {row['seq_len']}, {row['tokens']} tokens, top {found['top_k']}"
    return [
        f"| {name}, {row['dataset']} ({protocol}) | "
        + " | ".join(_number(values.get(kind, {}).get(key), 4) for kind in kinds)
        + " |"
        for key, name in DIVERGENCE_ROWS.items()
    ]


def _number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def render_report(
    results: Results,
    layers: pd.DataFrame,
    with_spectra: bool,
    with_steps: bool,
    notes: Sequence[Mapping[str, Any]] = (),
) -> str:
    """report.md: the comparison, its protocol, and the errors of single layers."""
    model, bits, seconds = results["model"], results["bits"], results["seconds"]
    worst = layers.nlargest(5, "output_error")[["name", "rank", "bits", "output_error_before", "output_error"]]
    if not layers["rank"].any():
        worst = worst.drop(columns=["rank", "output_error_before"])
    evaluations = "".join(f"- evaluated on {row['source']}\n" for row in results["perplexity"])
    pictures = _pictures(results, with_spectra, with_steps, any(_losses(note) for note in notes))
    shown = "\n\n".join(f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    paragraphs = [
        f"# {results['tag']}",
        shown_model(model),
        *[f"**Warning**: {warning}." for warning in results["warnings"]],
        summary_table(results),
        *map(str, figures_of(results)),
        *divergence_paragraphs(results),
        f"Bits per quantized weight, everything stored included: {_shown_bits(bits)}.\n"
        f"{shown_scheme(results['config']['quantize'])}.",
        *experts_paragraphs(results),
        *allocation_paragraphs(results),
        *widths_paragraphs(results),
        *damping_paragraphs(layers),
        *block_paragraphs(notes),
        *finetune_paragraphs(results),
        *export_paragraphs(results),
        f"- calibrated on {shown_calibration(results)}\n{evaluations}",
        shown,
        f"The five linears with the largest output error (all linears: `{results['layers']['file']}`):",
        markdown_table(worst),
        *decode_paragraphs(results),
        f"Time: {seconds['calibrate']:.1f} s calibration + {seconds['quantize']:.1f} s quantization + "
        f"{seconds['evaluate']:.1f} s evaluation on {results['device']}; peak memory "
        f"{results['peak_memory_bytes'] / 2**30:.2f} GiB.\nVersions: {versions}.",
    ]
    return "\n\n".join(paragraph.rstrip() for paragraph in paragraphs) + "\n"


def _pictures(results: Results, with_spectra: bool, with_steps: bool, with_losses: bool) -> list[str]:
    """The figures that there are of a run, in the order of the report."""
    there = {
        PERPLEXITY_FIGURE: _has_perplexity(results),
        ERROR_FIGURE: True,
        SPECTRA_FIGURE: with_spectra,
        WEIGHT_SPECTRA_FIGURE: with_spectra,
        STEPS_FIGURE: with_steps,
        RANKS_FIGURE: results["allocation"] is not None,
        ROUTING_FIGURE: results.get("experts") is not None,
        LOSSES_FIGURE: with_losses,
    }
    return [picture for picture, is_there in there.items() if is_there]


def shown_scheme(quantize: Mapping[str, Any]) -> str:
    """The parts of a resolved [quantize] table, by the names that a configuration gives them."""
    transforms = ", ".join(f"`{transform['kind']}`" for transform in quantize["transforms"])
    return (
        f"Method `{quantize['method']['kind']}`, rounding `{own_rounding(quantize)}`, "
        f"weights `{weights_name(quantize)}`, activations `{quantize['activation']}`, "
        f"attention operands `{quantize['attention']}`{f', transforms {transforms}' if transforms else ''}"
    )


def _shown_bits(bits: Bits) -> str:
    return " + ".join(f"{value:.4f} {name}" for name, value in named_parts(bits).items())


def markdown_table(table: pd.DataFrame) -> str:
    """A table as markdown: numbers with five significant digits, missing values as a dash."""
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(map(_cell, row)) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or pd.isna(value):
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
