"""Paragraphs of report.md, most of them of some runs only: none where there is nothing to say."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lqer.methods.block import CHANGED_CODES
from lqer.results import FinetuneInfo, Results

# What a token of the calibration text counts, by calibration.token_weights.
COUNTED = {
    "none": "",
    "residual": ", weighted by the inverse square of the residual stream where linears write to it",
    "gradient": ", weighted by squared gradients of the loss",
}


def shown_calibration(results: Results) -> str:
    """The calibration text, its size and what its tokens count; the same for all in a run before they had weights."""
    calibration = results["calibration"]
    counted = COUNTED[results["config"]["calibration"].get("token_weights", "none")]
    return f"{calibration['source']}: {calibration['tokens']} tokens{counted}"


def divergence_paragraphs(results: Results) -> list[str]:
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


def damping_paragraphs(layers: pd.DataFrame) -> list[str]:
    """How often a Hessian was not positive definite; empty if never."""
    raised = layers[layers["damping_raises"] > 0]
    if raised.empty:
        return []
    return [
        f"Damping had to be raised {int(raised['damping_raises'].sum())} times, in {len(raised)} linears "
        "(`damping_raises` in layers.csv): the calibration set is too small to estimate their Hessians."
    ]


def finetune_paragraphs(results: Results) -> list[str]:
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


def export_paragraphs(results: Results) -> list[str]:
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


def decode_paragraphs(results: Results) -> list[str]:
    """Decode speeds; empty where none was measured."""
    speeds = [f"{speed:.1f} ({role})" for role, speed in results["tokens_per_second"].items() if speed is not None]
    return [f"Tokens a second, one at a time without a cache: {', '.join(speeds)}."] if speeds else []


def widths_paragraphs(results: Results) -> list[str]:
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


def allocation_paragraphs(results: Results) -> list[str]:
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


def block_paragraphs(notes: Sequence[Mapping[str, Any]]) -> list[str]:
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
