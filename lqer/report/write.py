"""Writes a run's folder: results.json, layers.csv, report.md, report.html, figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lqer.checkpoint.bits import Bits, named_parts
from lqer.methods.block import CHANGED_CODES
from lqer.report import figures, layer_figures
from lqer.report.experts import experts_paragraphs
from lqer.report.families import family_of, rtn_family
from lqer.report.naming import rtn_name, scheme_name
from lqer.report.page.write import PAGE_FILE, Details, write_run_page
from lqer.report.published import figures_of
from lqer.results import RESULTS_FILE, FinetuneInfo, PerplexityRow, Results
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
    # Of experts alone.
    return (
        layers if "routed_tokens" not in table else layers.assign(routed_tokens=table["routed_tokens"].astype("Int64"))
    )


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


def _divergence_paragraphs(results: Results) -> list[str]:
    """What the divergences are a bound of; empty without them."""
    found = {row["dataset"]: row["divergence"] for row in results["perplexity"] if row["divergence"] is not None}
    if not found:
        return []
    covered = ", ".join(f"{info['covered']:.1%} on {dataset}" for dataset, info in found.items())
    return [
        "KL(original || candidate) of the next token, in nats: a lower bound, since after each token only the "
        f"original's {max(info['top_k'] for info in found.values())} most likely tokens are told apart. Their "
        f"probability: {covered}."
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
    model, calibration, bits, seconds = results["model"], results["calibration"], results["bits"], results["seconds"]
    quantize = results["config"]["quantize"]
    worst = layers.nlargest(5, "output_error")[["name", "rank", "bits", "output_error_before", "output_error"]]
    share = model["quantized_parameters"] / max(model["parameters"], 1)
    evaluations = "".join(f"- evaluated on {row['source']}\n" for row in results["perplexity"])
    pictures = [PERPLEXITY_FIGURE] if _has_perplexity(results) else []
    pictures += [ERROR_FIGURE, *([SPECTRA_FIGURE, WEIGHT_SPECTRA_FIGURE] if with_spectra else [])]
    pictures += [STEPS_FIGURE] if with_steps else []
    pictures += [RANKS_FIGURE] if results["allocation"] is not None else []
    pictures += [ROUTING_FIGURE] if results.get("experts") is not None else []
    pictures += [LOSSES_FIGURE] if any(_losses(note) for note in notes) else []
    shown = "\n\n".join(f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    paragraphs = [
        f"# {results['tag']}",
        f"{model['name']} ({model['architecture']}, {model['parameters'] / 1e6:.1f}M parameters; {share:.0%} of them "
        f"quantized).\n{model['description']}",
        *[f"**Warning**: {warning}." for warning in results["warnings"]],
        summary_table(results),
        *map(str, figures_of(results)),
        *_divergence_paragraphs(results),
        f"Bits per quantized weight, everything stored included: {_shown_bits(bits)}.\n"
        f"Method `{quantize['method']['kind']}`, weights `{quantize['weight']}`, "
        f"activations `{quantize['activation']}`, "
        f"attention operands `{quantize['attention']}`{_shown_transforms(quantize)}.",
        *experts_paragraphs(results),
        *_allocation_paragraphs(results),
        *_widths_paragraphs(results),
        *_damping_paragraphs(layers),
        *_block_paragraphs(notes),
        *_finetune_paragraphs(results),
        *_export_paragraphs(results),
        f"- calibrated on {calibration['source']}: {calibration['tokens']} tokens\n{evaluations}",
        shown,
        f"The five linears with the largest output error (all linears: `{results['layers']['file']}`):",
        markdown_table(worst),
        *_decode_paragraphs(results),
        f"Time: {seconds['calibrate']:.1f} s calibration + {seconds['quantize']:.1f} s quantization + "
        f"{seconds['evaluate']:.1f} s evaluation on {results['device']}; peak memory "
        f"{results['peak_memory_bytes'] / 2**30:.2f} GiB.\nVersions: {versions}.",
    ]
    return "\n\n".join(paragraph.rstrip() for paragraph in paragraphs) + "\n"


def _shown_transforms(quantize: Mapping[str, Any]) -> str:
    kinds = [transform["kind"] for transform in quantize["transforms"]]
    return f", transforms {', '.join(f'`{kind}`' for kind in kinds)}" if kinds else ""


def _damping_paragraphs(layers: pd.DataFrame) -> list[str]:
    """How often a Hessian was not positive definite; empty if never."""
    raised = layers[layers["damping_raises"] > 0]
    if raised.empty:
        return []
    return [
        f"Damping had to be raised {int(raised['damping_raises'].sum())} times, in {len(raised)} linears "
        "(`damping_raises` in layers.csv): the calibration set is too small to estimate their Hessians."
    ]


def _finetune_paragraphs(results: Results) -> list[str]:
    """The held-out loss before and after fine-tuning."""
    finetune = results["finetune"]
    if finetune is None:
        return []
    losses = finetune["validation_loss"]
    return [
        f"Fine-tuned ({', '.join(finetune['parts'])}) for {len(losses) - 1} epochs of {finetune['tokens']} tokens in "
        f"{results['seconds']['finetune']:.1f} s. Loss on held-out windows: {losses[0]:.4f} before, "
        f"{losses[finetune['best_epoch']]:.4f} after epoch {finetune['best_epoch']}, which is the one evaluated; "
        f"{finetune['original_loss']:.4f} of the original itself. {_shown_gain(finetune)}"
        "Errors of single linears were measured before fine-tuning."
    ]


def _export_paragraphs(results: Results) -> list[str]:
    """Where the checkpoint was written for other programs, and how it was compared; empty without exports."""
    if not results["exports"]:
        return []
    lines = ["| export | folder | MB | compared with the checkpoint |", "|---|---|---|---|"]
    for row in results["exports"]:
        if row["refused"] is not None:
            lines.append(f"| `{row['target']}` | – | – | refused: {row['refused']} |")
            continue
        compared = f"not verified: {row['not_verified']}"
        if row["not_verified"] is None:
            compared = (
                f"logits differ by up to {row['logit_difference']:.3g} (of up to {row['largest_logit']:.3g}), "
                f"perplexity {row['exported_perplexity']:.6g}, the checkpoint's {row['perplexity']:.6g}"
            )
        lines.append(f"| `{row['target']}` | `{row['folder']}` | {(row['weight_bytes'] or 0) / 1e6:.1f} | {compared} |")
    return ["\n".join(lines)]


def _shown_gain(finetune: FinetuneInfo) -> str:
    """The share of the distance to the original that is gone; empty if there was none."""
    before, best = (finetune["validation_loss"][epoch] for epoch in (0, finetune["best_epoch"]))
    if before <= finetune["original_loss"]:
        return ""
    return f"{(before - best) / (before - finetune['original_loss']):.0%} of the distance to it is gone. "


def _decode_paragraphs(results: Results) -> list[str]:
    """Decode speeds; empty where none was measured."""
    speeds = [f"{speed:.1f} ({role})" for role, speed in results["tokens_per_second"].items() if speed is not None]
    return [f"Tokens a second, one at a time without a cache: {', '.join(speeds)}."] if speeds else []


def _shown_bits(bits: Bits) -> str:
    return " + ".join(f"{value:.4f} {name}" for name, value in named_parts(bits).items())


def _widths_paragraphs(results: Results) -> list[str]:
    """The formats that the linears got, compared with one format for all."""
    widths = results["widths"]
    if widths is None:
        return []
    budget = results["config"]["quantize"]["budget_bits"]
    counts = ", ".join(f"{count} linears in `{name}`" for name, count in widths["linears"].items())
    uniform = "the narrowest" if widths["uniform"] is None else f"`{widths['uniform']}`"
    return [
        f"Widths were allocated within {budget:g} bits per weight: {counts}. Their estimated divergence from the "
        f"original is {widths['objective']:.5g} nats per token; {uniform} for all ({widths['uniform_bits']:.4f} bits) "
        f"has {widths['uniform_objective']:.5g}."
    ]


def _allocation_paragraphs(results: Results) -> list[str]:
    """The allocated ranks compared with a uniform rank."""
    allocation = results["allocation"]
    if allocation is None:
        return []
    budget = results["config"]["quantize"]["low_rank"]["budget_bits"]
    return [
        f"Ranks were allocated within {budget:g} bits per weight; the model uses "
        f"{results['bits']['average']:.4f}. The sum of the linears' relative errors under the method's metric is "
        f"{allocation['objective']:.5g}; a uniform rank of {allocation['uniform_rank']} "
        f"({allocation['uniform_bits']:.4f} bits) gives {allocation['uniform_objective']:.5g} (A and B not rounded)."
    ]


def _block_paragraphs(notes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The block output error before and after adaptive rounding."""
    losses = [note["loss"] for note in notes if "start" in note.get("loss", {})]
    if not losses:
        return []
    shown = ", ".join(f"{loss['start']:.4g} → {loss['end']:.4g}" for loss in losses)
    paragraph = (
        "Squared output error per calibration token, block by block, before → after adaptive rounding (reference: the "
        f"original block on the original model's hidden states): {shown}."
    )
    changed = [statistics.fmean(note[CHANGED_CODES].values()) for note in notes if CHANGED_CODES in note]
    if changed:
        paragraph += f" Codes changed, mean over the linears of a block: {', '.join(f'{c:.1%}' for c in changed)}."
    return [paragraph]


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
