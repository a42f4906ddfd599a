"""Writes a run's folder: results.json, layers.csv, report.md, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lqer.quantization import layers_file, spectra_file
from lqer.report import figures
from lqer.report.results import Results
from lqer.store import Artifact, write_atomically, write_json

LAYERS_FILE = "layers.csv"
REPORT_FILE = "report.md"
RESULTS_FILE = "results.json"
NAMES = {"original": "original", "plain": "plain rounding", "quantized": "quantized"}


def layer_rows(checkpoint: Artifact, blocks: int) -> list[dict[str, Any]]:
    """The per-linear rows that the quantize stage left, in the order of the model."""
    return [row for index in range(blocks) for row in checkpoint.json(layers_file(index))]


def layers_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """layers.csv: one row per linear; bits per original weight, errors relative."""
    table = pd.DataFrame(rows)
    weights = table["out_features"] * table["in_features"]
    total = table["weight_bits"] + table["metadata_bits"] + table["low_rank_bits"]
    return pd.DataFrame(
        {
            "name": table["name"],
            "out_features": table["out_features"],
            "in_features": table["in_features"],
            "rank": table["rank"],
            "bits": total / weights,
            "weight_error_before": table["weight_error_before"],
            "weight_error": table["weight_error"],
            "output_error_before": table["output_error_before"],
            "output_error": table["output_error"],
        }
    )


def write_run(folder: Path, results: Results, rows: Sequence[Mapping[str, Any]], checkpoint: Artifact, blocks: int) -> None:
    """Write everything a reader looks at; results.json comes last, so that its presence says the run is complete."""
    layers = layers_table(rows)
    write_atomically(folder / LAYERS_FILE, lambda beside: layers.to_csv(beside, index=False, float_format="%.6g"))
    spectra = {name: tensor.numpy() for name, tensor in checkpoint.tensors(spectra_file(blocks // 2)).items()}
    if spectra:
        middle = layers["name"].isin({name.rpartition(".")[0] for name in spectra})
        rank = int(layers.loc[middle, "rank"].max())
        figures.save_singular_values(folder / "figures/singular_values.png", spectra, rank)
    figures.save_output_errors(folder / "figures/output_error.png", layers)
    if results["perplexity"]:
        figures.save_perplexities(folder / "figures/perplexity.png", results["perplexity"], _bits_by_kind(results))
    text = render_report(results, layers)
    write_atomically(folder / REPORT_FILE, lambda beside: beside.write_text(text, encoding="utf-8") and None)
    write_json(folder / RESULTS_FILE, results)


def _bits_by_kind(results: Results) -> dict[str, float]:
    bits = {"quantized": results["bits"]["average"]}
    if results["baseline"] is not None:
        bits["plain"] = results["baseline"]["bits"]["average"]
    return bits


def summary_table(results: Results) -> str:
    """The table that a run ends with: one row per evaluation, one column per kind of model (markdown)."""
    kinds = ["original", *(["plain"] if results["baseline"] is not None else []), "quantized"]
    method = results["config"]["quantize"]["method"]
    names = NAMES | {"quantized": method if method != "none" else "plain rounding"}
    bits = _bits_by_kind(results)
    lines = [
        "| | " + " | ".join(names[kind] for kind in kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
        "| bits per quantized weight | " + " | ".join(f"{bits[kind]:.3f}" if kind in bits else "–" for kind in kinds) + " |",
    ]
    for row in results["perplexity"]:
        label = f"perplexity, {row['dataset']} ({row['protocol']}, seq_len {row['seq_len']}, {row['tokens']} tokens)"
        lines.append(f"| {label} | " + " | ".join(_number(row.get(kind), 4) for kind in kinds) + " |")
    for task in results["downstream"]:
        label = f"{task['task']} {task['metric']} ({task['num_fewshot']}-shot, {task['samples']} samples)"
        lines.append(f"| {label} | " + " | ".join(_number(task.get(kind), 4) for kind in kinds) + " |")
    return "\n".join(lines)


def _number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def render_report(results: Results, layers: pd.DataFrame) -> str:
    """report.md: what was compared, on what, and how each layer fared."""
    model, calibration, bits, seconds = (results[key] for key in ("model", "calibration", "bits", "seconds"))  # type: ignore[literal-required]
    quantize = results["config"]["quantize"]
    worst = layers.nlargest(5, "output_error")[["name", "rank", "bits", "output_error_before", "output_error"]]
    share = model["quantized_parameters"] / max(model["parameters"], 1)
    evaluations = "".join(f"- evaluated on {row['source']}\n" for row in results["perplexity"])
    pictures = "![perplexity](figures/perplexity.png)\n\n" if results["perplexity"] else ""
    return f"""# {results["tag"]}

{model["name"]} ({model["architecture"]}, {model["parameters"] / 1e6:.1f}M parameters; {share:.0%} of them quantized).
{model["description"]}

{summary_table(results)}

Bits are charged in full: {bits["weight"]:.3f} codes + {bits["metadata"]:.3f} scales and exponents + {bits["low_rank"]:.3f} low rank.
Method `{quantize["method"]}`, weights `{quantize["weight"]}`, activations `{quantize["activation"]}`, attention operands `{quantize["attention"]}`.

- calibrated on {calibration["source"]}: {calibration["tokens"]} tokens
{evaluations}
{pictures}![output error](figures/output_error.png)

![singular values](figures/singular_values.png)

The five linears with the largest output error (all of them: `{results["layers"]["file"]}`):

{_markdown(worst)}

Made in {seconds["calibrate"]:.1f} s calibration + {seconds["quantize"]:.1f} s quantization + {seconds["evaluate"]:.1f} s evaluation on
{results["device"]}; peak memory {results["peak_memory_bytes"] / 2**30:.2f} GiB. Versions: {", ".join(f"{k} {v}" for k, v in results["versions"].items())}.
"""


def _markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    return "\n".join(lines)
