"""The order of the stages: calibrate -> quantize -> evaluate -> report.

Each stage is a pure step from artifacts to one artifact; this module derives their names, loads a model only when a
stage really needs it, and never edits the configuration.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.checkpoint.bits import average_bits
from lqer.checkpoint.load import load_quantized, open_quantized
from lqer.config import Config
from lqer.config.schema import NOT_QUANTIZED
from lqer.data.datasets import calibration_windows, load_rows, tokens_sha256
from lqer.errors import ConfigError
from lqer.methods import LinearPlan
from lqer.models.loaders import OpenedModel
from lqer.models.open import load_whole, open_stored
from lqer.models.source import ModelSource, load_tokenizer
from lqer.models.streaming import open_model
from lqer.report.environment import device_name, peak_memory_bytes, versions
from lqer.report.tracking import track
from lqer.report.write import LAYERS_FILE, layer_rows, write_run
from lqer.results import (
    SCHEMA_VERSION,
    AllocationInfo,
    Baseline,
    CalibrationInfo,
    FinetuneInfo,
    Layers,
    ModelInfo,
    Results,
    Seconds,
)
from lqer.run.chunks import Chunk
from lqer.run.context import RunContext, prepare
from lqer.run.folder import begin_run, link_checkpoint, logging_to
from lqer.run.preflight import check_fit
from lqer.stages.allocate_ranks import Budget, allocate_ranks, measure_spectra, spectra_key
from lqer.stages.calibrate import CalibrationText, calibrate, calibration_key
from lqer.stages.evaluate import Candidate, evaluate
from lqer.stages.finetune import HISTORY_FILE, finetune, finetune_key
from lqer.stages.quantize import (
    QuantizeSettings,
    finish_checkpoint,
    quantization_key,
    quantize,
    quantize_blocks,
    requested_statistics,
)
from lqer.stages.quantize_sequential import quantize_in_order, stream_key
from lqer.stages.rotate import rotate, rotated_source, rotation_key
from lqer.store.names import block_file
from lqer.store.store import Artifact, Store, Workspace
from lqer.transforms import BlockTransform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Where statistics come from: a text, and what calibration made of it; nothing yet in the quantized stream."""

    text: CalibrationText
    calibration: Artifact | None


def run(config: Config) -> Results:
    """Run the experiment, or what of it the store does not hold yet, and write its folder. Returns results.json."""
    results = run_chunk(config, None)
    assert results is not None, "only a share may end before the others"
    return results


def run_chunk(config: Config, share: Chunk | None) -> Results | None:
    """The same by one of several processes: quantize the share's blocks alone.

    Returns None, having said so, where other shares are still missing; else goes on to evaluate and report. Raises
    ConfigError for a method whose blocks must be quantized in order.
    """
    if share is not None:
        refuse_chunks(config, share)
    started = time.monotonic()
    folder = begin_run(config)
    with logging_to(folder):
        results = _run(config, folder, started, share)
    if config.tracking is not None and results is not None:
        track(config.tracking, results)
    return results


def refuse_chunks(config: Config, share: Chunk) -> None:
    """Raise ConfigError where a block is quantized on what the quantized blocks before it put out."""
    if config.quantize.stream == "quantized":
        parts = " and ".join(config.quantize.block_parts) or f"method {config.quantize.method!r}"
        by = "" if config.quantize.propagate else f", for {parts}"
        raise ConfigError(
            f"--chunk {share}: quantize.propagate is 'quantized'{by}: a block's inputs come from the quantized blocks "
            "before it, so blocks cannot be quantized apart: run it without --chunk"
        )


def _run(config: Config, folder: Path, started: float, share: Chunk | None) -> Results | None:
    context = prepare(config)
    store = Store(context.store_path, log.info)
    tokenizer = load_tokenizer(context.source)
    log.info(
        "%s: %s, %d linears in %d blocks, on %s",
        config.tag, config.model, len(context.summary.linears), context.summary.blocks, device_name(context.device),
    )  # fmt: skip

    text, calibration_info = _read_calibration_text(context, tokenizer)
    training_WT = _read_training_text(context, tokenizer)
    check_fit(context, log.info, _artifacts(context, store, text, training_WT))
    context = replace(context, quantize_source=_rotate(context, store))
    inputs = Inputs(text, _calibrate(context, store, text) if config.quantize.stream == "original" else None)
    budget = _allocate_ranks(context, store, inputs)
    ranked = context.plans if budget is None else budget.plans
    checkpoint = _quantize(context, store, tokenizer, inputs, ranked, share)
    plain: Artifact | None = None
    with_plain = "plain" in config.evaluation.baselines
    if with_plain:
        plans = {name: plan and plan.without_low_rank() for name, plan in context.plans.items()}
        plain = _quantize(context, store, tokenizer, inputs, plans, share, " (plain rounding)")
    if checkpoint is None or (with_plain and plain is None):
        log.info("share %s is done; others are not there yet: whoever finishes last goes on to evaluate", share)
        return None
    quantized_seconds = checkpoint.seconds
    tuned = None if training_WT is None else _finetune(context, store, checkpoint, training_WT)
    checkpoint = tuned or checkpoint
    link_checkpoint(folder, checkpoint.path)

    candidates = {"quantized": _candidate_from_checkpoint(context, checkpoint)}
    if plain is not None:
        candidates["plain"] = _candidate_from_checkpoint(context, plain)
    if "original" in config.evaluation.baselines:
        candidates["original"] = Candidate(context.source.fingerprint, lambda: _load_original(context))
    arithmetic = {"dtype": str(context.dtype), "device": context.device.type, "backend": context.backend}
    evaluation = evaluate(config.evaluation, candidates, tokenizer, store, arithmetic, config.seed)

    rows = layer_rows(checkpoint, context.summary.blocks)
    results = Results(
        schema_version=SCHEMA_VERSION,
        tag=config.tag,
        config=config.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        model=_model_info(context, rows),
        bits=average_bits(rows),
        allocation=None if budget is None else _allocation(budget),
        baseline=None if plain is None else Baseline(bits=average_bits(layer_rows(plain, context.summary.blocks))),
        finetune=None if tuned is None else _finetune_info(context, tuned),
        calibration=calibration_info,
        perplexity=evaluation.perplexity,
        downstream=evaluation.downstream,
        layers=Layers(file=LAYERS_FILE, count=len(rows)),
        seconds=Seconds(
            calibrate=0.0 if inputs.calibration is None else inputs.calibration.seconds,
            quantize=quantized_seconds + (budget.seconds if budget else 0.0),
            finetune=0.0 if tuned is None else tuned.seconds,
            evaluate=evaluation.seconds,
            total=round(time.monotonic() - started, 3),
        ),
        peak_memory_bytes=peak_memory_bytes(context.device, all_gpus=config.device_map == "auto"),
        device=device_name(context.device),
    )
    write_run(folder, results, rows, checkpoint, context.summary.blocks)
    return results


def _rotate(context: RunContext, store: Store) -> ModelSource:
    """The model in the basis that it is quantized in: the original, unless a transform of the whole model is named."""
    if not context.config.quantize.rotates:
        return context.source
    source, seed = context.source, context.config.seed
    artifact = _obtain(
        store, "rotate", rotation_key(source, seed), lambda workspace: rotate(workspace, source, context.device, seed)
    )
    return rotated_source(source, artifact)


def _read_calibration_text(
    context: RunContext, tokenizer: PreTrainedTokenizerBase
) -> tuple[CalibrationText, CalibrationInfo]:
    settings = context.config.calibration
    rows = load_rows(settings.dataset, "calibration")
    windows_WT = calibration_windows(tokenizer, rows, settings.num_samples, settings.seq_len)
    info = CalibrationInfo(
        dataset=settings.dataset.label,
        source=rows.source,
        tokens=windows_WT.numel(),
        fingerprint=tokens_sha256(windows_WT),
    )
    return CalibrationText(windows_WT, settings.batch_size, settings.error_tokens), info


def _read_training_text(context: RunContext, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """The token windows of fine-tuning, read before calibration so that a text that will not do costs nothing."""
    settings = context.config.finetune
    if settings is None:
        return None
    windows = settings.num_samples + settings.validation_samples
    asked_by = "finetune.num_samples + validation_samples"
    text = load_rows(settings.dataset, "calibration")
    return calibration_windows(tokenizer, text, windows, settings.seq_len, asked_by)


def _calibration_key(context: RunContext, text: CalibrationText) -> dict[str, Any]:
    requested = requested_statistics(context.plans)
    return calibration_key(context.quantize_source.fingerprint, text, context.dtype, context.device, requested)


def _artifacts(
    context: RunContext, store: Store, text: CalibrationText, training_WT: Tensor | None
) -> dict[str, list[Path]]:
    """Where the artifacts of the stages lie, or will, as far as their names are known before they are made."""
    paths: dict[str, list[Path]] = {}
    if context.config.quantize.rotates:
        rotation = rotation_key(context.source, context.config.seed)
        paths["rotate"], rotated = [store.path("rotate", rotation)], store.find("rotate", rotation)
        if rotated is None:
            return paths
        # It is verified when it is read.
        context = replace(context, quantize_source=replace(context.quantize_source, fingerprint=rotated.content))
    calibration: Artifact | None = None
    if context.config.quantize.stream == "original":
        key = _calibration_key(context, text)
        paths["calibrate"], calibration = [store.path("calibrate", key)], store.find("calibrate", key)
        if calibration is None:
            return paths
    if context.config.quantize.low_rank.budget_bits is None:
        several = [context.plans]
        if "plain" in context.config.evaluation.baselines:
            several.append({name: plan and plan.without_low_rank() for name, plan in context.plans.items()})
        keys = [_quantization_key(context, Inputs(text, calibration), plans) for plans in several]
        paths["quantize"], checkpoint = [store.path("quantize", key) for key in keys], store.find("quantize", keys[0])
        if training_WT is not None and checkpoint is not None:
            paths["finetune"] = [store.path("finetune", _finetune_key(context, checkpoint, training_WT))]
    return paths


def _calibrate(context: RunContext, store: Store, text: CalibrationText) -> Artifact:
    def make(workspace):
        opened = open_model(context.quantize_source, context.dtype, context.device, context.offload())
        calibrate(workspace, opened, text, requested_statistics(context.plans))

    return _obtain(store, "calibrate", _calibration_key(context, text), make)


def _allocate_ranks(context: RunContext, store: Store, inputs: Inputs) -> Budget | None:
    """The plans with the ranks that quantize.low_rank.budget_bits leads to; None where there is no budget."""
    budget_bits = context.config.quantize.low_rank.budget_bits
    if budget_bits is None:
        return None
    calibration = inputs.calibration
    assert calibration is not None, "the configuration admits no budget in the quantized stream"
    key = spectra_key(calibration.content, context.quantize_source.fingerprint, context.plans, context.device)

    def make(workspace):
        opened = open_stored(context.quantize_source, context.device)
        measure_spectra(workspace, opened, calibration, context.plans)

    spectra = _obtain(store, "spectra", key, make)
    budget = allocate_ranks(context.plans, spectra, context.summary.blocks, context.summary.linears, budget_bits)
    log.info(
        "budget: %.4f of %g bits, ranks %d to %d; summed relative error %.5g, at uniform rank %d (%.4f bits) %.5g",
        budget.average_bits, budget_bits, *budget.range, budget.allocation.objective, budget.allocation.uniform_rank,
        budget.uniform_average_bits, budget.allocation.uniform_objective,
    )  # fmt: skip
    return budget


def _allocation(budget: Budget) -> AllocationInfo:
    allocation = budget.allocation
    return AllocationInfo(
        objective=allocation.objective,
        uniform_rank=allocation.uniform_rank,
        uniform_bits=budget.uniform_average_bits,
        uniform_objective=allocation.uniform_objective,
    )


def _quantize_settings(context: RunContext, plans: dict[str, LinearPlan | None]) -> QuantizeSettings:
    quantize_config = context.config.quantize
    attention = None
    if quantize_config.attention != NOT_QUANTIZED:
        operand = context.config.formats[quantize_config.attention].to_dict()
        attention = {"format": operand, "blocks": quantize_config.attention_blocks}
    transforms = tuple(part for part in quantize_config.transforms if isinstance(part, BlockTransform))
    return QuantizeSettings(plans, attention, context.config.seed, transforms)


def _quantization_key(context: RunContext, inputs: Inputs, plans: dict[str, LinearPlan | None]) -> Any:
    settings = _quantize_settings(context, plans)
    known = (
        stream_key(context.quantize_source.fingerprint, inputs.text, context.dtype, context.device, settings)
        if inputs.calibration is None
        else inputs.calibration.content
    )
    return quantization_key(known, context.quantize_source.fingerprint, settings, context.device)


def _quantize(
    context: RunContext,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
    plans: dict[str, LinearPlan | None],
    share: Chunk | None,
    label: str = "",
) -> Artifact | None:
    """The checkpoint, made whole or, with a share, together with other processes: None while theirs are missing.

    label: what tells it from the other checkpoint of the run, for the user.
    """
    settings = _quantize_settings(context, plans)
    key = _quantization_key(context, inputs, plans)

    opened: OpenedModel | None = None

    def original() -> OpenedModel:
        nonlocal opened
        opened = opened or open_stored(context.quantize_source, context.device)
        return opened

    def make(workspace: Workspace) -> None:
        if inputs.calibration is not None:
            quantize(workspace, original(), tokenizer, inputs.calibration, settings)
            return
        running = open_model(context.quantize_source, context.dtype, context.device, context.offload())
        quantize_in_order(workspace, original(), running, inputs.text, settings)
        finish_checkpoint(workspace, original(), tokenizer, settings)

    total = context.summary.blocks

    def contribute(workspace: Workspace) -> None:
        assert share is not None
        assert inputs.calibration is not None, "the quantized stream has no shares"
        quantize_blocks(workspace, share.blocks(total), original(), inputs.calibration, settings)

    def is_whole(workspace: Workspace) -> bool:
        return all(block_file(index) in workspace for index in range(total))

    if share is None:
        return _obtain(store, "quantize", key, make, label)
    _say_if_reused(store, "quantize", key, label)
    return store.share("quantize", key, contribute, is_whole, make)


def _finetune_key(context: RunContext, checkpoint: Artifact, windows_WT: Tensor) -> dict[str, Any]:
    settings = context.config.finetune
    assert settings is not None
    fingerprint, arithmetic = context.source.fingerprint, (context.dtype, context.device)
    return finetune_key(fingerprint, checkpoint, windows_WT, settings, context.config.seed, *arithmetic)


def _finetune(context: RunContext, store: Store, checkpoint: Artifact, windows_WT: Tensor) -> Artifact:
    """The checkpoint after fine-tuning."""
    settings = context.config.finetune
    assert settings is not None

    def make(workspace: Workspace) -> None:
        checkpoint.verify()
        student, original = _whole_quantized(context, checkpoint, "emulate"), _whole_original(context)
        finetune(workspace, checkpoint, student, original, windows_WT, settings, context.config.seed)

    return _obtain(store, "finetune", _finetune_key(context, checkpoint, windows_WT), make)


def _finetune_info(context: RunContext, tuned: Artifact) -> FinetuneInfo:
    settings, history = context.config.finetune, tuned.json(HISTORY_FILE)
    assert settings is not None
    return FinetuneInfo(
        parts=list(settings.parts),
        tokens=settings.num_samples * settings.seq_len,
        validation_loss=history["validation_loss"],
        best_epoch=history["best_epoch"],
    )


def _obtain(store: Store, stage: str, key, make: Callable, label: str = "") -> Artifact:
    """store.obtain with a word to the user; `label` tells artifacts of one stage apart."""
    _say_if_reused(store, stage, key, label)
    return store.obtain(stage, key, make)


def _say_if_reused(store: Store, stage: str, key, label: str) -> None:
    if store.find(stage, key) is not None:
        log.info("%s%s: reused, %s", stage, label, store.path(stage, key).name)


def _load_original(context: RunContext) -> PreTrainedModel | OpenedModel:
    if context.config.evaluation.blockwise:
        return open_model(context.source, context.dtype, context.device, context.offload())
    return _whole_original(context)


def _whole_original(context: RunContext) -> PreTrainedModel:
    return load_whole(context.source, context.dtype, context.device, context.config.device_map)


def _candidate_from_checkpoint(context: RunContext, checkpoint: Artifact) -> Candidate:
    def load() -> PreTrainedModel | OpenedModel:
        checkpoint.verify()
        if context.config.evaluation.blockwise:
            return open_quantized(checkpoint.path, context.device, context.dtype, context.backend, context.offload())
        return _whole_quantized(context, checkpoint, context.backend)

    return Candidate(checkpoint.content, load)


def _whole_quantized(context: RunContext, checkpoint: Artifact, backend: str) -> PreTrainedModel:
    return load_quantized(checkpoint.path, context.device, context.dtype, backend, context.config.device_map)


def _model_info(context: RunContext, rows: list[dict]) -> ModelInfo:
    return ModelInfo(
        name=context.config.model,
        revision=context.source.revision,
        fingerprint=context.source.fingerprint,
        architecture=context.summary.architecture,
        parameters=context.summary.parameters,
        quantized_parameters=sum(row["out_features"] * row["in_features"] for row in rows),
        description=context.source.description,
    )
