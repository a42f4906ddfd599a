"""The README.md of an export: the front matter that a hub reads, what was done, its cost, and how it was checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

import lqer
from lqer.export.base import Closeness, Target
from lqer.export.source import Source
from lqer.export.verify import Outcome
from lqer.store.files import without_nonfinite

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CARD_FILE = "README.md"
# To wait for the original's card.
HUB_SECONDS = 5
EXPECTED: dict[Closeness, str] = {
    "exact": "the checkpoint's logits to the last bit",
    "reordered": "the checkpoint's logits, but for the order of sums in float32",
    "rounded": "logits that differ a little, as weights or products are rounded once more",
    "other inputs": "logits that differ a little, as inputs are rounded by a slightly other rule",
}
CONFIGURATION_SHOWN = ("calibration", "quantize", "formats")


def render_card(
    source: Source,
    target: Target,
    outcome: Outcome,
    out: str,
    weight_bytes: int,
) -> str:
    """README.md of the folder `out`."""
    commands = target.commands(out, source)
    parts = [
        f"---\n{front_matter(source, target).to_yaml()}\n---\n",
        f"# {_title(source)}, {target.kind}",
        _made(source, target, weight_bytes),
        *_scores(source.results),
        "## Use",
        *(f"{program}:\n\n```{_language(command)}\n{command}\n```" for program, command in commands.items()),
        "## What this export keeps",
        "\n".join(f"- {line}" for line in [*_kept(source, target), *outcome.written.notes]),
        "## Verification",
        _verification(outcome),
    ]
    return "\n\n".join(parts) + configuration(source.results) + "\n"


def _language(command: str) -> str:
    return "python" if "(" in command else "sh"


def _base(source: Source) -> str | None:
    """The original's id on the hub, if it has one."""
    name = "" if source.results is None else source.results["model"]["name"]
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _title(source: Source) -> str:
    name = source.config.get("model_type", "model") if source.results is None else source.results["model"]["name"]
    return Path(str(name)).name


def front_matter(source: Source, target: Target) -> ModelCardData:
    """What a hub reads: the original, its licence, the library, and the formats of the weights as tags."""
    formats = sorted({str(getattr(spec.format, "element", spec.format.kind)) for spec in source.specs.values()})
    base = _base(source)
    extra: dict[str, Any] = {} if base is None else {"base_model_relation": "quantized"}
    return ModelCardData(
        base_model=base,
        license=_license(source),
        library_name=target.library_name,
        pipeline_tag="text-generation",
        tags=["lqer", *target.tags, *formats],
        quantized_by="lqer",
        **extra,
    )


def _license(source: Source) -> str | None:
    """The licence that the original's own card names, in its folder or on the hub; None where neither can be read."""
    if source.results is None:
        return None
    card = Path(source.results["model"]["name"]).expanduser() / CARD_FILE
    try:
        if (base := _base(source)) is not None:
            card = Path(hf_hub_download(base, CARD_FILE, etag_timeout=HUB_SECONDS))
        stated = ModelCard.load(card).data.license if card.is_file() else None
    except (OSError, ValueError, HfHubHTTPError):  # no hub, no card, or its front matter is not YAML
        return None
    return stated if isinstance(stated, str) else None


def _made(source: Source, target: Target, weight_bytes: int) -> str:
    bits = source.details["bits"]
    cost = (
        f"{bits['average']:.3f} bits per weight of these linears in lqer's checkpoint: {bits['weight']:.3f} codes, "
        f"{bits['metadata']:.3f} scales and other metadata, {bits['low_rank']:.3f} low-rank factors"
    )
    lines = [
        f"{len(source.specs)} linears, quantized by lqer {lqer.__version__}",
        cost,
        f"files of weights, unquantized ones included: {weight_bytes / 1e6:.1f} MB",
        f"exported to `{target.kind}` from checkpoint `{source.key[:16]}`, with torch {version('torch')} and "
        f"transformers {version('transformers')}",
    ]
    if source.results is not None:
        quantize, calibration = source.results["config"]["quantize"], source.results["calibration"]
        text = f"{calibration['tokens']} tokens of {calibration['dataset']}"
        lines.insert(1, f"method `{quantize['method']['kind']}`, calibrated on {text}")
    if _license(source) is None:
        lines.append("licence: that of the original model")
    return "\n".join(f"- {line}" for line in lines)


def _scores(results: Mapping[str, Any] | None) -> list[str]:
    if results is None or not results["perplexity"]:
        return []
    header = "| text | protocol | tokens | original | this checkpoint |\n|---|---|---|---|---|"
    rows = [
        f"| {row['dataset']} | {row['protocol']}, windows of {row['seq_len']} | {row['tokens']} "
        f"| {_number(row['original'])} | {_number(row['quantized'])} |"
        for row in results["perplexity"]
    ]
    return ["Perplexity, measured by lqer before the export:", "\n".join([header, *rows])]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _kept(source: Source, target: Target) -> list[str]:
    dropped = [spec.name for spec in source.specs.values() if not target.keeps_activation(spec)]
    lines = []
    if dropped:
        lines.append(f"Inputs are not rounded here; the checkpoint rounds those of {len(dropped)} linears.")
    if target.drops_attention(source):
        lines.append("The operands of attention are not rounded here; the checkpoint rounds them.")
    return lines or ["Everything that the checkpoint computes."]


def _verification(outcome: Outcome) -> str:
    check = outcome.check
    if check is None:
        return f"Not verified: {outcome.unverified}."
    lines = [
        f"The files were read back and compared in {check.dtype} with the checkpoint, on windows of "
        f"{check.tokens_per_window} tokens ({check.text}):",
        "",
        f"- largest difference of a logit: {check.logit_difference:.3g}, of logits up to {check.largest_logit:.3g}",
        f"- perplexity over {check.windows} windows: {check.exported_perplexity:.6g}; the checkpoint, without "
        f"what is not kept, {check.perplexity:.6g}; the whole checkpoint {check.whole_perplexity:.6g}",
        f"- expected of these files: {EXPECTED[outcome.written.closeness]}",
    ]
    return "\n".join(lines)


def configuration(results: Mapping[str, Any] | None) -> str:
    """The sections of the configuration that made the checkpoint, as TOML; nothing without the results of a run."""
    if results is None:
        return ""
    config = results["config"]
    shown = {key: config[key] for key in CONFIGURATION_SHOWN if key in config}
    named = set(_words(config["quantize"]))
    shown["formats"] = {name: described for name, described in config["formats"].items() if name in named}
    return f"\n\n## Configuration\n\n```toml\n{tomli_w.dumps(_without_none(without_nonfinite(shown)))}```"


def _words(value: Any) -> Iterator[str]:
    """The strings in a table, at any depth: names of formats are among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _words(entry)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value if entry is not None] if isinstance(value, list) else value
