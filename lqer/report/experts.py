"""What a report says of experts: how many of the bits a token reads, and which of them saw little of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lqer.checkpoint.bits import PARTS
from lqer.config.schema import CalibrationConfig
from lqer.results import ExpertsInfo, Results

# Experts that are named one by one in a report.
MOST_NAMED = 8
# Parts of a linear's bits that are counted within another.
WITHIN_METADATA = ("codebook", "zero", "sign")


def experts_info(rows: Sequence[Mapping[str, Any]], calibration: CalibrationConfig, tokens: int) -> ExpertsInfo | None:
    """What the rows of a checkpoint's linears say of its experts; None for a model without experts.

    tokens: of the calibration text. A token reads all linears but those of experts that it is not sent to.
    """
    sent = {row["name"].rpartition(".")[0]: row["routed_tokens"] for row in rows if "routed_tokens" in row}
    if not sent:
        return None
    shares = [row["routed_tokens"] / tokens if "routed_tokens" in row else 1.0 for row in rows]
    weights = sum(share * row["out_features"] * row["in_features"] for share, row in zip(shares, rows, strict=True))
    stored = [part for part in PARTS if part not in WITHIN_METADATA]
    bits = sum(share * sum(row[f"{part}_bits"] for part in stored) for share, row in zip(shares, rows, strict=True))
    routed = calibration.experts == "routed"
    return ExpertsInfo(
        count=len(sent),
        active_weights=weights,
        active_bits=bits,
        active_average=bits / max(weights, 1.0),
        fewest_tokens=min(sent.values()),
        topped_up=[name for name, count in sent.items() if routed and count < calibration.min_expert_tokens],
        unseen=[name for name, count in sent.items() if not count],
    )


def experts_warnings(info: ExpertsInfo | None, minimum: int) -> list[str]:
    """What a reader must know of experts that saw little of the calibration text."""
    if info is None or not info["topped_up"]:
        return []
    names, unseen = info["topped_up"], len(info["unseen"])
    named = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
    return [
        f"{len(names)} of {info['count']} experts were sent fewer than {minimum} calibration tokens, {unseen} of them "
        f"none, and were also calibrated on other tokens of their layer: {named}"
    ]


def experts_paragraphs(results: Results) -> list[str]:
    """The active bits beside those of all weights; empty for a model without experts, or of a run before there were."""
    info = results.get("experts")
    if info is None:
        return []
    everything = results["bits"]["average"] * results["model"]["quantized_parameters"]
    return [
        f"Of its {info['count']} experts a token reads some: {info['active_weights'] / 1e6:.4g}M of the quantized "
        f"weights and {info['active_bits'] / 8e6:.4g} of their {everything / 8e6:.4g} MB, {info['active_average']:.4f} "
        f"bits per active weight (mean over the calibration text). The expert that was sent fewest got "
        f"{info['fewest_tokens']} of {results['calibration']['tokens']} tokens (`routed_tokens` in layers.csv)."
    ]
