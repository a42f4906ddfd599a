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

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.allocation import Budget, measure_spectra, share_out_ranks, spectra_key
from lqer.bits import average_bits
from lqer.blocks import OpenedModel
from lqer.calibration import CalibrationText, block_file, calibrate, calibration_key
from lqer.checkpoint import load_quantized, open_quantized
from lqer.config import Config
from lqer.config.schema import NOT_QUANTIZED
from lqer.data import calibration_windows, load_rows, tokens_sha256
from lqer.dispatch import spread
from lqer.errors import ConfigError
from lqer.evaluation.stage import Candidate, evaluate
from lqer.finetune import HISTORY_FILE, finetune, finetune_key
from lqer.methods import LinearPlan
from lqer.models import (
    ModelSource,
    load_model,
    load_tokenizer,
)
from lqer.preview import check_fit
from lqer.quantization import (
    QuantizeSettings,
    finish_checkpoint,
    quantization_key,
    quantize,
    quantize_blocks,
    requested_statistics,
)
from lqer.report.environment import device_name, peak_memory_bytes, versions
from lqer.report.results import (
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
from lqer.report.write import LAYERS_FILE, layer_rows, write_run
from lqer.rotation import open_rotated, rotate, rotated_source, rotation_key
from lqer.run_folder import begin_run, link_checkpoint, logging_to
from lqer.sequential import quantize_in_order, stream_key
from lqer.setting import Setting, prepare
from lqer.shares import Share
from lqer.store import Artifact, Store, Workspace
from lqer.streaming import open_model
from lqer.tracking import track
from lqer.transforms import BlockTransform
from lqer.tuning import block_step, remove_states

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Where statistics come from: a text, and what calibration made of it; nothing yet in the quantized stream."""

    text: CalibrationText
    calibration: Artifact | None


def run(config: Config) -> Results:
    """Run the experiment, or what of it the store does not hold yet, and write its folder. Returns results.json."""
    results = run_share(config, None)
    assert results is not None, "only a share may end before the others"
    return results


def run_share(config: Config, share: Share | None) -> Results | None:
    """The same by one of several processes: quantize the share's blocks alone.

    Returns None, having said so, where other shares are still missing; else goes on to evaluate and report. Raises
    ConfigError for a method whose blocks must be quantized in order.
    """
    if share is not None:
        refuse_sharing(config, share)
    started = time.monotonic()
    folder = begin_run(config)
    with logging_to(folder):
        results = _run(config, folder, started, share)
    if config.tracking is not None and results is not None:
        track(config.tracking, results)
    return results


def refuse_sharing(config: Config, share: Share) -> None:
    """Raise ConfigError where a block is quantized on what the quantized blocks before it put out."""
    if config.quantize.stream == "quantized":
        parts = " and ".join(config.quantize.block_parts) or f"method {config.quantize.method!r}"
        by = "" if config.quantize.propagate else f", for {parts}"
        raise ConfigError(
            f"--chunk {share}: quantize.propagate is 'quantized'{by}: a block's inputs come from the quantized blocks "
            "before it, so blocks cannot be quantized apart: run it without --chunk"
        )


def _run(config: Config, folder: Path, started: float, share: Share | None) -> Results | None:
    setting = prepare(config)
    store = Store(setting.store_path, log.info)
    tokenizer = load_tokenizer(setting.source)
    log.info(
        "%s: %s, %d linears in %d blocks, on %s",
        config.tag, config.model, len(setting.outline.linears), setting.outline.blocks, device_name(setting.device),
    )  # fmt: skip

    text, calibration_info = _read_calibration_text(setting, tokenizer)
    training_WT = _read_training_text(setting, tokenizer)
    check_fit(setting, log.info, _artifacts(setting, store, text, training_WT))
    setting = replace(setting, basis=_rotate(setting, store))
    inputs = Inputs(text, _calibrate(setting, store, text) if config.quantize.stream == "original" else None)
    budget = _share_out(setting, store, inputs)
    ranked = setting.plans if budget is None else budget.plans
    checkpoint = _quantize(setting, store, tokenizer, inputs, ranked, share)
    plain: Artifact | None = None
    with_plain = "plain" in config.evaluation.baselines
    if with_plain:
        plans = {name: plan and plan.plain() for name, plan in setting.plans.items()}
        plain = _quantize(setting, store, tokenizer, inputs, plans, share, " (plain rounding)")
    if checkpoint is None or (with_plain and plain is None):
        log.info("share %s is done; others are not there yet: whoever finishes last goes on to evaluate", share)
        return None
    quantized_seconds = checkpoint.seconds
    tuned = None if training_WT is None else _finetune(setting, store, checkpoint, training_WT)
    checkpoint = tuned or checkpoint
    link_checkpoint(folder, checkpoint.path)

    candidates = {"quantized": _candidate_from_checkpoint(setting, checkpoint)}
    if plain is not None:
        candidates["plain"] = _candidate_from_checkpoint(setting, plain)
    if "original" in config.evaluation.baselines:
        candidates["original"] = Candidate(setting.source.fingerprint, lambda: _load_original(setting))
    arithmetic = {"dtype": str(setting.dtype), "device": setting.device.type, "backend": setting.backend}
    evaluation = evaluate(config.evaluation, candidates, tokenizer, store, arithmetic, config.seed)

    rows = layer_rows(checkpoint, setting.outline.blocks)
    results = Results(
        schema_version=SCHEMA_VERSION,
        tag=config.tag,
        config=config.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        model=_model_info(setting, rows),
        bits=average_bits(rows),
        allocation=None if budget is None else _allocation(budget),
        baseline=None if plain is None else Baseline(bits=average_bits(layer_rows(plain, setting.outline.blocks))),
        finetune=None if tuned is None else _finetune_info(setting, tuned),
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
        peak_memory_bytes=peak_memory_bytes(setting.device, all_gpus=config.device_map == "auto"),
        device=device_name(setting.device),
    )
    write_run(folder, results, rows, checkpoint, setting.outline.blocks)
    return results


def _rotate(setting: Setting, store: Store) -> ModelSource:
    """The model in the basis that it is quantized in: the original, unless a transform of the whole model is named."""
    if not setting.config.quantize.rotates:
        return setting.source
    source, seed = setting.source, setting.config.seed
    artifact = _obtain(
        store, "rotate", rotation_key(source, seed), lambda workspace: rotate(workspace, source, setting.device, seed)
    )
    return rotated_source(source, artifact)


def _read_calibration_text(
    setting: Setting, tokenizer: PreTrainedTokenizerBase
) -> tuple[CalibrationText, CalibrationInfo]:
    settings = setting.config.calibration
    rows = load_rows(settings.dataset, "calibration")
    windows_WT = calibration_windows(tokenizer, rows, settings.num_samples, settings.seq_len)
    info = CalibrationInfo(
        dataset=settings.dataset.label,
        source=rows.source,
        tokens=windows_WT.numel(),
        fingerprint=tokens_sha256(windows_WT),
    )
    return CalibrationText(windows_WT, settings.batch_size, settings.error_tokens), info


def _read_training_text(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """The token windows of fine-tuning, read before calibration so that a text that will not do costs nothing."""
    settings = setting.config.finetune
    if settings is None:
        return None
    windows = settings.num_samples + settings.validation_samples
    asked_by = "finetune.num_samples + validation_samples"
    text = load_rows(settings.dataset, "calibration")
    return calibration_windows(tokenizer, text, windows, settings.seq_len, asked_by)


def _calibration_key(setting: Setting, text: CalibrationText) -> dict[str, Any]:
    requested = requested_statistics(setting.plans)
    return calibration_key(setting.basis.fingerprint, text, setting.dtype, setting.device, requested)


def _artifacts(
    setting: Setting, store: Store, text: CalibrationText, training_WT: Tensor | None
) -> dict[str, list[Path]]:
    """Where the artifacts of the stages lie, or will, as far as their names are known before they are made."""
    paths: dict[str, list[Path]] = {}
    if setting.config.quantize.rotates:
        rotation = rotation_key(setting.source, setting.config.seed)
        paths["rotate"], rotated = [store.path("rotate", rotation)], store.find("rotate", rotation)
        if rotated is None:
            return paths
        # It is verified when it is read.
        setting = replace(setting, basis=replace(setting.basis, fingerprint=rotated.content))
    calibration: Artifact | None = None
    if setting.config.quantize.stream == "original":
        key = _calibration_key(setting, text)
        paths["calibrate"], calibration = [store.path("calibrate", key)], store.find("calibrate", key)
        if calibration is None:
            return paths
    if setting.config.quantize.low_rank.budget_bits is None:
        several = [setting.plans]
        if "plain" in setting.config.evaluation.baselines:
            several.append({name: plan and plan.plain() for name, plan in setting.plans.items()})
        keys = [_quantization_key(setting, Inputs(text, calibration), plans) for plans in several]
        paths["quantize"], checkpoint = [store.path("quantize", key) for key in keys], store.find("quantize", keys[0])
        if training_WT is not None and checkpoint is not None:
            paths["finetune"] = [store.path("finetune", _finetune_key(setting, checkpoint, training_WT))]
    return paths


def _calibrate(setting: Setting, store: Store, text: CalibrationText) -> Artifact:
    def make(workspace):
        opened = open_model(setting.basis, setting.dtype, setting.device, setting.spill())
        calibrate(workspace, opened, text, requested_statistics(setting.plans))

    return _obtain(store, "calibrate", _calibration_key(setting, text), make)


def _open_stored(setting: Setting) -> OpenedModel:
    """The model that is quantized, its blocks as they are stored: a rotation's in float32."""
    if setting.basis is not setting.source:
        return open_rotated(setting.basis, setting.device)
    return open_model(setting.basis, "auto", setting.device)


def _share_out(setting: Setting, store: Store, inputs: Inputs) -> Budget | None:
    """The plans with the ranks that quantize.low_rank.budget_bits leads to; None where there is no budget."""
    budget_bits = setting.config.quantize.low_rank.budget_bits
    if budget_bits is None:
        return None
    calibration = inputs.calibration
    assert calibration is not None, "the configuration admits no budget in the quantized stream"
    key = spectra_key(calibration.content, setting.basis.fingerprint, setting.plans, setting.device)

    def make(workspace):
        opened = _open_stored(setting)
        measure_spectra(workspace, opened, calibration, setting.plans)

    spectra = _obtain(store, "spectra", key, make)
    budget = share_out_ranks(setting.plans, spectra, setting.outline.blocks, setting.outline.linears, budget_bits)
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


def _quantize_settings(setting: Setting, plans: dict[str, LinearPlan | None]) -> QuantizeSettings:
    quantize_config = setting.config.quantize
    attention = None
    if quantize_config.attention != NOT_QUANTIZED:
        operand = setting.config.formats[quantize_config.attention].to_dict()
        attention = {"format": operand, "blocks": quantize_config.attention_blocks}
    transforms = tuple(part for part in quantize_config.transforms if isinstance(part, BlockTransform))
    return QuantizeSettings(plans, attention, setting.config.seed, transforms)


def _quantization_key(setting: Setting, inputs: Inputs, plans: dict[str, LinearPlan | None]) -> Any:
    settings = _quantize_settings(setting, plans)
    known = (
        stream_key(setting.basis.fingerprint, inputs.text, setting.dtype, setting.device, settings)
        if inputs.calibration is None
        else inputs.calibration.content
    )
    return quantization_key(known, setting.basis.fingerprint, settings, setting.device)


def _quantize(
    setting: Setting,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
    plans: dict[str, LinearPlan | None],
    share: Share | None,
    label: str = "",
) -> Artifact | None:
    """The checkpoint, made whole or, with a share, together with other processes: None while theirs are missing.

    label: what tells it from the other checkpoint of the run, for the user.
    """
    settings = _quantize_settings(setting, plans)
    key = _quantization_key(setting, inputs, plans)

    opened: OpenedModel | None = None

    def original() -> OpenedModel:
        nonlocal opened
        opened = opened or _open_stored(setting)
        return opened

    def make(workspace: Workspace) -> None:
        if inputs.calibration is not None:
            quantize(workspace, original(), tokenizer, inputs.calibration, settings)
            return
        running = open_model(setting.basis, setting.dtype, setting.device, setting.spill())
        step = block_step(workspace, settings, inputs.text.batch_size)
        quantize_in_order(workspace, original(), running, inputs.text, settings, step)
        remove_states(workspace)
        finish_checkpoint(workspace, original(), tokenizer, settings)

    total = setting.outline.blocks

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


def _finetune_key(setting: Setting, checkpoint: Artifact, windows_WT: Tensor) -> dict[str, Any]:
    settings = setting.config.finetune
    assert settings is not None
    fingerprint, arithmetic = setting.source.fingerprint, (setting.dtype, setting.device)
    return finetune_key(fingerprint, checkpoint, windows_WT, settings, setting.config.seed, *arithmetic)


def _finetune(setting: Setting, store: Store, checkpoint: Artifact, windows_WT: Tensor) -> Artifact:
    """The checkpoint after fine-tuning."""
    settings = setting.config.finetune
    assert settings is not None

    def make(workspace: Workspace) -> None:
        checkpoint.verify()
        student, original = _whole_quantized(setting, checkpoint, "emulate"), _whole_original(setting)
        finetune(workspace, checkpoint, student, original, windows_WT, settings, setting.config.seed)

    return _obtain(store, "finetune", _finetune_key(setting, checkpoint, windows_WT), make)


def _finetune_info(setting: Setting, tuned: Artifact) -> FinetuneInfo:
    settings, history = setting.config.finetune, tuned.json(HISTORY_FILE)
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


def _load_original(setting: Setting) -> PreTrainedModel | OpenedModel:
    if setting.config.evaluation.blockwise:
        return open_model(setting.source, setting.dtype, setting.device, setting.spill())
    return _whole_original(setting)


def _whole_original(setting: Setting) -> PreTrainedModel:
    if _several_gpus(setting):
        return spread(open_model(setting.source, setting.dtype, torch.device("cpu")))
    return load_model(setting.source, setting.dtype, setting.device)


def _candidate_from_checkpoint(setting: Setting, checkpoint: Artifact) -> Candidate:
    def load() -> PreTrainedModel | OpenedModel:
        checkpoint.verify()
        if setting.config.evaluation.blockwise:
            return open_quantized(checkpoint.path, setting.device, setting.dtype, setting.backend, setting.spill())
        return _whole_quantized(setting, checkpoint, setting.backend)

    return Candidate(checkpoint.content, load)


def _whole_quantized(setting: Setting, checkpoint: Artifact, backend: str) -> PreTrainedModel:
    if _several_gpus(setting):
        return spread(open_quantized(checkpoint.path, setting.device, setting.dtype, backend))
    return load_quantized(checkpoint.path, setting.device, setting.dtype, backend)


def _several_gpus(setting: Setting) -> bool:
    return setting.config.device_map == "auto" and setting.device.type == "cuda" and torch.cuda.device_count() > 1


def _model_info(setting: Setting, rows: list[dict]) -> ModelInfo:
    return ModelInfo(
        name=setting.config.model,
        revision=setting.source.revision,
        fingerprint=setting.source.fingerprint,
        architecture=setting.outline.architecture,
        parameters=setting.outline.parameters,
        quantized_parameters=sum(row["out_features"] * row["in_features"] for row in rows),
        description=setting.source.description,
    )
