"""Assembles results.json from the artifacts of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lqer.checkpoint.bits import average_bits
from lqer.checkpoint.pack import checkpoint_bytes
from lqer.config import Config
from lqer.data.datasets import DatasetSpec
from lqer.methods.block import KEPT_START
from lqer.models.source import ModelSource
from lqer.models.summary import ModelSummary
from lqer.report.environment import device_name, peak_memory_bytes, versions
from lqer.report.experts import experts_info, experts_warnings
from lqer.report.write import LAYERS_FILE, block_notes, layer_rows
from lqer.results import (
    SCHEMA_VERSION,
    AllocationInfo,
    Baseline,
    CalibrationInfo,
    Decode,
    Divergence,
    DivergenceInfo,
    DownstreamRow,
    FinetuneInfo,
    Layers,
    ModelInfo,
    PerplexityRow,
    Results,
    Seconds,
    WidthsInfo,
)
from lqer.stages.allocate_ranks import Ranks
from lqer.stages.allocate_widths import Widths
from lqer.stages.finetune import HISTORY_FILE
from lqer.store.store import Artifact

# A measurement of every candidate, by its role: "quantized" and, where asked for, "original" and "rtn".
ByRole = Mapping[str, Any]


@dataclass(frozen=True)
class MeasuredText:
    """A text, where it comes from, a hash of its tokens or documents, and the results of every candidate on it.

    divergence: of every candidate but the original; empty unless asked for.
    """

    spec: DatasetSpec
    source: str
    fingerprint: str
    results: ByRole
    divergence: ByRole


@dataclass(frozen=True)
class Made:
    """The artifacts of a run; None where the configuration does not ask for one.

    quantized: before fine-tuning. overlaps: warnings about texts that were both learned from and evaluated.
    """

    token_weights: Artifact | None
    calibration: Artifact | None
    ranks: Ranks | None
    widths: Widths | None
    quantized: Artifact
    rtn: Artifact | None
    finetuned: Artifact | None
    perplexity: Sequence[MeasuredText]
    downstream: ByRole
    decode: ByRole
    evaluate_seconds: float
    overlaps: Sequence[str]

    @property
    def checkpoint(self) -> Artifact:
        """The result of the run."""
        return self.finetuned or self.quantized


def assemble(
    config: Config,
    source: ModelSource,
    summary: ModelSummary,
    device: torch.device,
    calibration: CalibrationInfo,
    made: Made,
    started: float,
) -> Results:
    """results.json. started: `time.monotonic()` at the start of the run."""
    rows = layer_rows(made.checkpoint, summary.blocks)
    experts = experts_info(rows, config.calibration, calibration["tokens"])
    rtn = None if made.rtn is None else Baseline(bits=average_bits(layer_rows(made.rtn, summary.blocks)))
    return Results(
        schema_version=SCHEMA_VERSION,
        tag=config.tag,
        warnings=[
            *_warnings(made, summary.blocks),
            *experts_warnings(experts, config.calibration.min_expert_tokens),
        ],
        config=config.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        model=_model_info(config, source, summary, rows),
        bits=average_bits(rows),
        checkpoint_bytes=checkpoint_bytes(made.checkpoint.path, summary.blocks),
        allocation=None if made.ranks is None else _allocation_info(made.ranks),
        widths=None if made.widths is None else _widths_info(config, made.widths),
        baseline=rtn,
        experts=experts,
        finetune=None if made.finetuned is None else _finetune_info(config, made.finetuned),
        calibration=calibration,
        perplexity=_perplexity_rows(made.perplexity),
        downstream=_downstream_rows(made.downstream),
        exports=[],
        tokens_per_second=Decode(original=made.decode.get("original"), quantized=made.decode.get("quantized")),
        layers=Layers(file=LAYERS_FILE, count=len(rows)),
        seconds=Seconds(
            calibrate=sum((one.seconds for one in (made.token_weights, made.calibration) if one is not None), 0.0),
            quantize=made.quantized.seconds + sum(chosen.seconds for chosen in (made.ranks, made.widths) if chosen),
            finetune=0.0 if made.finetuned is None else made.finetuned.seconds,
            evaluate=round(made.evaluate_seconds, 3),
            total=round(time.monotonic() - started, 3),
        ),
        peak_memory_bytes=peak_memory_bytes(device, all_gpus=config.device_map == "auto"),
        device=device_name(device),
    )


def _model_info(
    config: Config, source: ModelSource, summary: ModelSummary, rows: Sequence[Mapping[str, Any]]
) -> ModelInfo:
    return ModelInfo(
        name=config.model,
        revision=source.revision,
        fingerprint=source.fingerprint,
        architecture=summary.architecture,
        parameters=summary.parameters,
        quantized_parameters=sum(row["out_features"] * row["in_features"] for row in rows),
        description=source.description,
    )


def _allocation_info(ranks: Ranks) -> AllocationInfo:
    return AllocationInfo(
        objective=ranks.allocation.objective,
        uniform_rank=ranks.allocation.uniform_rank,
        uniform_bits=ranks.uniform_average_bits,
        uniform_objective=ranks.allocation.uniform_objective,
    )


def _widths_info(config: Config, widths: Widths) -> WidthsInfo:
    names, allocation = [*config.quantize.widths], widths.allocation
    names += [f"{name} with A and B" for name in names if config.quantize.low_rank.optional]
    return WidthsInfo(
        linears=dict(zip(names, widths.counts, strict=True)),
        average_bits=widths.average_bits,
        objective=allocation.loss,
        uniform=None if allocation.uniform is None else names[allocation.uniform],
        uniform_bits=widths.uniform_average_bits,
        uniform_objective=allocation.uniform_loss,
    )


def _finetune_info(config: Config, finetuned: Artifact) -> FinetuneInfo:
    settings, history = config.finetune, finetuned.json(HISTORY_FILE)
    assert settings is not None, "only a run with [finetune] makes this artifact"
    return FinetuneInfo(
        parts=list(settings.parts),
        tokens=settings.num_samples * settings.seq_len,
        validation_loss=history["validation_loss"],
        original_loss=history["original_loss"],
        best_epoch=history["best_epoch"],
    )


def _warnings(made: Made, blocks: int) -> list[str]:
    """What a reader of the numbers must know first."""
    found = list(made.overlaps)
    found += [
        f"the perplexity of the {role} model on {text.spec.label} is not finite"
        for text in made.perplexity
        for role, result in text.results.items()
        if result["perplexity"] is None
    ]
    found += [
        f"the divergence of the {role} model from the original on {text.spec.label} is not finite"
        for text in made.perplexity
        for role, result in text.divergence.items()
        if result["kl_mean"] is None
    ]
    kept = [str(index) for index, note in enumerate(block_notes(made.quantized, blocks)) if note.get(KEPT_START)]
    if kept:
        found.append(
            f"learning left the output of {len(kept)} of {blocks} blocks worse than its start, which was kept instead "
            f"(blocks {', '.join(kept)})"
        )
    if made.finetuned is not None and made.finetuned.json(HISTORY_FILE)["best_epoch"] == 0:
        found.append("no epoch of fine-tuning improved the held-out loss: the checkpoint is the one before it")
    return found


def _perplexity_rows(texts: Sequence[MeasuredText]) -> list[PerplexityRow]:
    names = distinct_labels([text.spec for text in texts])
    return [_perplexity_row(name, text) for name, text in zip(names, texts, strict=True)]


def distinct_labels(specs: Sequence[DatasetSpec]) -> list[str]:
    """The labels of texts, with folder and column where the label alone would name two of them."""
    labels = [spec.label for spec in specs]
    return [
        label if labels.count(label) == 1 else f"{Path(spec.path).parent.name}/{label}:{spec.text_column}"
        for label, spec in zip(labels, specs, strict=True)
    ]


def _perplexity_row(name: str, text: MeasuredText) -> PerplexityRow:
    quantized = text.results["quantized"]
    values = {role: result["perplexity"] for role, result in text.results.items()}
    return PerplexityRow(
        dataset=name,
        source=text.source,
        fingerprint=text.fingerprint,
        protocol=quantized["protocol"],
        seq_len=quantized["seq_len"],
        tokens=quantized["tokens"],
        original=values.get("original"),
        rtn=values.get("rtn"),
        quantized=values["quantized"],
        divergence=_divergence_info(text.divergence) if text.divergence else None,
    )


def _divergence_info(results: ByRole) -> DivergenceInfo:
    values = {
        role: Divergence(kl_mean=row["kl_mean"], kl_p99=row["kl_p99"], top1_agreement=row["top1_agreement"])
        for role, row in results.items()
    }
    quantized = results["quantized"]
    return DivergenceInfo(
        top_k=quantized["top_k"],
        covered=quantized["covered"],
        rtn=values.get("rtn"),
        quantized=values["quantized"],
    )


def _downstream_rows(results: ByRole) -> list[DownstreamRow]:
    values = {role: {(row["task"], row["metric"]): row["value"] for row in rows} for role, rows in results.items()}
    return [
        DownstreamRow(
            task=row["task"],
            metric=row["metric"],
            original=values.get("original", {}).get((row["task"], row["metric"])),
            rtn=values.get("rtn", {}).get((row["task"], row["metric"])),
            quantized=row["value"],
            stderr=row["stderr"],
            num_fewshot=row["num_fewshot"],
            samples=row["samples"],
        )
        for row in results.get("quantized", ())
    ]
