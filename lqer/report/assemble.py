"""Assembles results.json from the artifacts of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lqer.checkpoint.bits import average_bits
from lqer.config import Config
from lqer.data.datasets import DatasetSpec
from lqer.models.source import ModelSource
from lqer.models.summary import ModelSummary
from lqer.report.environment import device_name, peak_memory_bytes, versions
from lqer.report.write import LAYERS_FILE, layer_rows
from lqer.results import (
    SCHEMA_VERSION,
    AllocationInfo,
    Baseline,
    CalibrationInfo,
    DownstreamRow,
    FinetuneInfo,
    Layers,
    ModelInfo,
    PerplexityRow,
    Results,
    Seconds,
)
from lqer.stages.allocate_ranks import Budget
from lqer.stages.finetune import HISTORY_FILE
from lqer.store.store import Artifact

# A measurement of every candidate, by its role: "quantized" and, where asked for, "original" and "rtn".
ByRole = Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """The artifacts of a run; None where the configuration does not ask for one.

    quantized: before fine-tuning. perplexity: label and source of a text, with the result of every candidate on it.
    """

    calibration: Artifact | None
    budget: Budget | None
    quantized: Artifact
    rtn: Artifact | None
    finetuned: Artifact | None
    perplexity: Sequence[tuple[DatasetSpec, str, ByRole]]
    downstream: ByRole
    evaluate_seconds: float

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
    rtn = None if made.rtn is None else Baseline(bits=average_bits(layer_rows(made.rtn, summary.blocks)))
    return Results(
        schema_version=SCHEMA_VERSION,
        tag=config.tag,
        config=config.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        model=_model_info(config, source, summary, rows),
        bits=average_bits(rows),
        allocation=None if made.budget is None else _allocation_info(made.budget),
        baseline=rtn,
        finetune=None if made.finetuned is None else _finetune_info(config, made.finetuned),
        calibration=calibration,
        perplexity=[_perplexity_row(*measured) for measured in made.perplexity],
        downstream=_downstream_rows(made.downstream),
        layers=Layers(file=LAYERS_FILE, count=len(rows)),
        seconds=Seconds(
            calibrate=0.0 if made.calibration is None else made.calibration.seconds,
            quantize=made.quantized.seconds + (made.budget.seconds if made.budget else 0.0),
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


def _allocation_info(budget: Budget) -> AllocationInfo:
    return AllocationInfo(
        objective=budget.allocation.objective,
        uniform_rank=budget.allocation.uniform_rank,
        uniform_bits=budget.uniform_average_bits,
        uniform_objective=budget.allocation.uniform_objective,
    )


def _finetune_info(config: Config, finetuned: Artifact) -> FinetuneInfo:
    settings, history = config.finetune, finetuned.json(HISTORY_FILE)
    assert settings is not None, "only a run with [finetune] makes this artifact"
    return FinetuneInfo(
        parts=list(settings.parts),
        tokens=settings.num_samples * settings.seq_len,
        validation_loss=history["validation_loss"],
        best_epoch=history["best_epoch"],
    )


def _perplexity_row(spec: DatasetSpec, source: str, results: ByRole) -> PerplexityRow:
    quantized = results["quantized"]
    values = {role: result["perplexity"] for role, result in results.items()}
    return PerplexityRow(
        dataset=spec.label,
        source=source,
        protocol=quantized["protocol"],
        seq_len=quantized["seq_len"],
        tokens=quantized["tokens"],
        original=values.get("original"),
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
