"""What a page compares: the candidates of runs, and the measures that they were judged by."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lqer.checkpoint.bits import named_parts
from lqer.report.families import Family, family_of, rtn_family
from lqer.report.naming import TEXT_DIGITS, rtn_name, scheme_name, weights_name
from lqer.report.ranking import activation_bits
from lqer.results import Divergence, DivergenceInfo, DownstreamRow, PerplexityRow, Results

KL, TOP1 = "KL from the original", "top-1 agreement"
FINE_TUNED = " + fine-tuning"
SHORT = {KL: "KL", TOP1: "top-1"}

Role = Literal["original", "rtn", "quantized"]


@dataclass(frozen=True)
class Measure:
    """One number that candidates of one model are compared by; equal measures can be compared.

    protocol: everything that must agree besides the name of the text or task. fingerprint: of the text.
    """

    quantity: str
    model: str
    subject: str  # text or task
    protocol: str
    fingerprint: str = ""
    lower_is_better: bool = True

    @property
    def heading(self) -> str:
        """Over a column of a table."""
        return SHORT.get(self.quantity, self.quantity)

    @property
    def title(self) -> str:
        return f"{self.quantity}, {self.subject} ({self.protocol})"


@dataclass(frozen=True)
class Candidate:
    """One row: a scheme of a run, its bits, and its value by every measure that it was judged by."""

    tag: str
    model: str
    scheme: str
    family: Family
    weight: str
    activation: str
    activation_bits: float
    rank: str
    bits: float
    size: float | None  # of the checkpoint in GB; None of a baseline, and in runs that did not write it down
    parts: Mapping[str, float]  # of bits, by name
    command: str  # that repeats the run
    href: str  # of the page of the run; empty if there is none
    quantize_seconds: float
    values: Mapping[Measure, float] = field(default_factory=dict)

    @property
    def rounds_activations(self) -> bool:
        return self.activation != "none"


def measures_of(candidates: Sequence[Candidate], originals: Mapping[Measure, float]) -> list[Measure]:
    """All measures, those of one model together, in the order in which they occur."""
    found = dict.fromkeys([*(measure for one in candidates for measure in one.values), *originals])
    models = list(dict.fromkeys(measure.model for measure in found))
    return sorted(found, key=lambda measure: models.index(measure.model))


def candidates_of(results: Results, href: str = "") -> list[Candidate]:
    """The checkpoint of a run and, where the run evaluated it and it differs, the same without low-rank factors."""
    config, quantize = results["config"], results["config"]["quantize"]
    shared = {
        "tag": results["tag"],
        "model": model_name(results),
        "weight": weights_name(quantize),
        "activation": quantize["activation"],
        "activation_bits": activation_bits(config),
        "command": repeat_command(config),
        "href": href,
        "quantize_seconds": results["seconds"]["quantize"],
    }
    found = [
        Candidate(
            scheme=scheme_name(quantize) + (FINE_TUNED if results["finetune"] else ""),
            family=family_of(config),
            rank=_rank(quantize, results["bits"]["low_rank"]),
            bits=results["bits"]["average"],
            size=_size(results),
            parts=named_parts(results["bits"]),
            values=_values(results, "quantized"),
            **shared,
        )
    ]
    baseline, values = results["baseline"], _values(results, "rtn")
    # A scheme without factors is its own baseline.
    if baseline is not None and values and results["bits"]["low_rank"]:
        found.append(
            Candidate(
                scheme=rtn_name(quantize),
                family=rtn_family(config),
                rank="0",
                bits=baseline["bits"]["average"],
                size=None,
                parts=named_parts(baseline["bits"]),
                values=values,
                **shared,
            )
        )
    return found


def originals_of(results: Results) -> dict[Measure, float]:
    """The values of the unquantized model, which is at no distance from itself."""
    return _values(results, "original")


def model_name(results: Results) -> str:
    """The model's name as a page shows it: without the folders of a local one."""
    return Path(results["model"]["name"]).name


def repeat_command(config: Mapping[str, Any]) -> str:
    """The command that repeats a run from its resolved configuration."""
    return shlex.join(["lqer", "run", str(Path(config["output_dir"]) / config["tag"] / "config.toml")])


def _size(results: Mapping[str, Any]) -> float | None:
    stored = results.get("checkpoint_bytes")
    return None if stored is None else stored / 1e9


def _rank(quantize: Mapping[str, Any], low_rank_bits: float) -> str:
    low_rank = quantize["low_rank"]
    if not low_rank_bits:
        return "0"
    return "allocated" if low_rank.get("budget_bits") is not None else str(low_rank["rank"])


def _values(results: Results, role: Role) -> dict[Measure, float]:
    model = model_name(results)
    found: dict[Measure, float | None] = {}
    for row in results["perplexity"]:
        found[_of_text("perplexity", model, row)] = row[role]
        divergence = row.get("divergence")
        if divergence is not None and role != "original":
            found |= _divergences(model, row, divergence, divergence[role])
    for task in results["downstream"]:
        found[_of_task(model, task)] = task[role]
    return {measure: value for measure, value in found.items() if value is not None}


def _divergences(
    model: str, row: PerplexityRow, info: DivergenceInfo, found: Divergence | None
) -> dict[Measure, float | None]:
    if found is None:
        return {}
    return {
        _of_text(KL, model, row, f", top {info['top_k']}"): found["kl_mean"],
        _of_text(TOP1, model, row, lower_is_better=False): found["top1_agreement"],
    }


def _of_text(quantity: str, model: str, row: PerplexityRow, more: str = "", lower_is_better: bool = True) -> Measure:
    protocol = f"{row['protocol']}, seq_len {row['seq_len']}, {row['tokens']} tokens{more}"
    fingerprint = row["fingerprint"][:TEXT_DIGITS]
    return Measure(quantity, model, row["dataset"], protocol, fingerprint, lower_is_better)


def _of_task(model: str, row: DownstreamRow) -> Measure:
    protocol = f"{row['num_fewshot']}-shot, {row['samples']} samples"
    return Measure(row["metric"], model, row["task"], protocol, lower_is_better="perplexity" in row["metric"])
