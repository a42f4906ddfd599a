"""The order of the stages: calibrate -> quantize -> evaluate -> report.

Each stage is a pure step from artifacts to one artifact; this module derives their names, loads a model only when a
stage really needs it, and never edits the configuration.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tomli_w
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.allocation import Budget, check_budget, measure_spectra, share_out_ranks, spectra_key
from lqer.backend import Backend, resolve_backend
from lqer.bits import average_bits
from lqer.calibration import ON_REQUEST, calibrate, calibration_key
from lqer.checkpoint import load_quantized
from lqer.config import Config
from lqer.config.schema import NOT_QUANTIZED, LowRankConfig
from lqer.data import calibration_windows, load_rows, tokens_sha256
from lqer.errors import HubError
from lqer.evaluation.stage import Candidate, evaluate
from lqer.files import write_text
from lqer.methods import METHODS, LinearPlan
from lqer.models import ModelSource, find_blocks, load_model, load_tokenizer, pick_device, pick_dtype, resolve_model
from lqer.outline import Outline, plan_model, read_outline
from lqer.quantization import QuantizeSettings, quantization_key, quantize
from lqer.report.environment import device_name, peak_memory_bytes, versions
from lqer.report.results import (
    SCHEMA_VERSION,
    AllocationInfo,
    Baseline,
    CalibrationInfo,
    Layers,
    ModelInfo,
    Results,
    Seconds,
)
from lqer.report.write import LAYERS_FILE, RESULTS_FILE, layer_rows, write_run
from lqer.store import Artifact, Store
from lqer.tracking import track

log = logging.getLogger(__name__)

CHECKPOINT_LINK = "checkpoint"
CONFIG_FILE = "config.toml"


@dataclass(frozen=True)
class Setting:
    """What every stage of one run shares."""

    config: Config
    source: ModelSource
    outline: Outline
    plans: dict[str, LinearPlan | None]
    device: torch.device
    dtype: torch.dtype
    backend: Backend

    @property
    def requested(self) -> frozenset[str]:
        """The statistics that cost something and that some linear's method or rounding needs."""
        plans = [plan for plan in self.plans.values() if plan is not None]
        return ON_REQUEST & frozenset().union(*(METHODS[plan.method].statistics_for(plan) for plan in plans))


def prepare(config: Config) -> Setting:
    """Resolve everything that can be wrong before any work is done. Raises LqerError."""
    device = pick_device(config.device)
    source = resolve_model(config.model, config.revision)
    outline = read_outline(source)
    plans = plan_model(config, outline)
    if (budget_bits := config.quantize.low_rank.budget_bits) is not None:
        check_budget(plans, outline.linears, budget_bits)
    if config.evaluation.downstream is not None:
        from lqer.evaluation.downstream import check_tasks

        downstream = config.evaluation.downstream
        check_tasks(
            downstream.tasks, _path(downstream.include_path), _path(downstream.data_dir), downstream.num_fewshot
        )
    dtype = pick_dtype(config.dtype, source, device)
    formats = {name: (plan.weight, plan.activation) for name, plan in plans.items() if plan is not None}
    backend = resolve_backend(config.evaluation.backend, device, dtype, formats)
    return Setting(config, source, outline, plans, device, dtype, backend)


def run(config: Config) -> Results:
    """Run the experiment, or what of it the store does not hold yet, and write its folder. Returns results.json."""
    started = time.monotonic()
    folder = Path(config.output_dir) / config.tag
    folder.mkdir(parents=True, exist_ok=True)
    resolved = config.model_dump(mode="json", exclude_none=True)
    write_text(folder / CONFIG_FILE, tomli_w.dumps(resolved))
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    with _logging_to(folder / "run.log"):
        results = _run(config, folder, started)
    if config.tracking is not None:
        track(config.tracking, results)
    return results


def describe(config: Config) -> str:
    """What `--validate` prints: the experiment in a few lines, checked against the model where that is at hand."""
    quantize = config.quantize
    lines = [
        f"{config.tag}: {config.model}",
        f"method {quantize.method}, {_shown_rank(quantize.low_rank)}; weights {_shown(config, quantize.weight)}; "
        f"activations {_shown(config, quantize.activation)}; A and B {_shown(config, quantize.low_rank.format)}; "
        f"attention operands {_shown(config, quantize.attention)}",
    ]
    try:
        setting = prepare(config)
    except HubError as error:
        lines.append(f"not checked against the model: {error}")
    else:
        planned = sum(plan is not None for plan in setting.plans.values())
        lines.append(f"{planned} of {len(setting.plans)} linears in {setting.outline.blocks} blocks are quantized")
    return "\n".join([*lines, "valid"])


def _shown_rank(low_rank: LowRankConfig) -> str:
    return f"rank {low_rank.rank}" if low_rank.budget_bits is None else f"ranks within {low_rank.budget_bits:g} bits"


def _shown(config: Config, format_name: str) -> str:
    if format_name == NOT_QUANTIZED:
        return "as they are"
    number_format = config.formats[format_name]
    return f"{format_name} ({number_format.kind}, {number_format.bits_per_value(4096):g} bits)"


def _run(config: Config, folder: Path, started: float) -> Results:
    setting = prepare(config)
    store = Store(Path(config.output_dir) / "store", log.info)
    tokenizer = load_tokenizer(setting.source)
    log.info(
        "%s: %s, %d linears in %d blocks, on %s",
        config.tag, config.model, len(setting.outline.linears), setting.outline.blocks, device_name(setting.device),
    )  # fmt: skip

    calibration, calibration_info = _calibrate(setting, store, tokenizer)
    budget = _share_out(setting, store, calibration)
    checkpoint = _quantize(setting, store, tokenizer, calibration, setting.plans if budget is None else budget.plans)
    _link(folder / CHECKPOINT_LINK, checkpoint.path)

    candidates = {"quantized": _candidate_from_checkpoint(setting, checkpoint)}
    plain: Artifact | None = None
    if "plain" in config.evaluation.baselines:
        plans = {name: plan and plan.plain() for name, plan in setting.plans.items()}
        plain = _quantize(setting, store, tokenizer, calibration, plans)
        candidates["plain"] = _candidate_from_checkpoint(setting, plain)
    if "original" in config.evaluation.baselines:
        load = partial(load_model, setting.source, setting.dtype, setting.device)
        candidates["original"] = Candidate(setting.source.fingerprint, load)
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
        calibration=calibration_info,
        perplexity=evaluation.perplexity,
        downstream=evaluation.downstream,
        layers=Layers(file=LAYERS_FILE, count=len(rows)),
        seconds=Seconds(
            calibrate=calibration.seconds,
            quantize=checkpoint.seconds + (budget.seconds if budget else 0.0),
            evaluate=evaluation.seconds,
            total=round(time.monotonic() - started, 3),
        ),
        peak_memory_bytes=peak_memory_bytes(setting.device),
        device=device_name(setting.device),
    )
    write_run(folder, results, rows, checkpoint, setting.outline.blocks)
    return results


def _calibrate(setting: Setting, store: Store, tokenizer: PreTrainedTokenizerBase) -> tuple[Artifact, CalibrationInfo]:
    settings = setting.config.calibration
    text = load_rows(settings.dataset, "calibration")
    windows_WT = calibration_windows(tokenizer, text, settings.num_samples, settings.seq_len)
    tokens = tokens_sha256(windows_WT)
    key = calibration_key(
        setting.source.fingerprint, tokens, settings.batch_size, settings.error_tokens, setting.dtype, setting.device,
        setting.requested,
    )  # fmt: skip

    def make(workspace):
        model = load_model(setting.source, setting.dtype, torch.device("cpu"))
        name, blocks = find_blocks(model)
        calibrate(
            workspace, model, name, blocks, windows_WT, settings.batch_size, settings.error_tokens, setting.device,
            setting.requested,
        )  # fmt: skip

    artifact = _obtain(store, "calibrate", key, make)
    info = CalibrationInfo(
        dataset=settings.dataset.label,
        source=text.source,
        tokens=windows_WT.numel(),
        fingerprint=tokens,
    )
    return artifact, info


def _share_out(setting: Setting, store: Store, calibration: Artifact) -> Budget | None:
    """The plans with the ranks that quantize.low_rank.budget_bits leads to; None where there is no budget."""
    budget_bits = setting.config.quantize.low_rank.budget_bits
    if budget_bits is None:
        return None
    key = spectra_key(calibration.content, setting.source.fingerprint, setting.plans, setting.device)

    def make(workspace):
        name, blocks = find_blocks(load_model(setting.source, "auto", torch.device("cpu")))
        measure_spectra(workspace, name, blocks, calibration, setting.plans, setting.device)

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


def _quantize(
    setting: Setting,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Artifact,
    plans: dict[str, LinearPlan | None],
) -> Artifact:
    quantize_config = setting.config.quantize
    attention = None
    if quantize_config.attention != NOT_QUANTIZED:
        operand = setting.config.formats[quantize_config.attention].to_dict()
        attention = {"format": operand, "blocks": quantize_config.attention_blocks}
    settings = QuantizeSettings(plans, attention, setting.config.seed)
    key = quantization_key(calibration.content, setting.source.fingerprint, settings, setting.device)

    def make(workspace):
        model = load_model(setting.source, "auto", torch.device("cpu"))
        name, blocks = find_blocks(model)
        quantize(workspace, model, tokenizer, name, blocks, calibration, settings, setting.device)

    plain = not any(plan and plan.rank for plan in plans.values())
    return _obtain(store, "quantize", key, make, " (plain rounding)" if plain else "")


def _obtain(store: Store, stage: str, key, make: Callable, label: str = "") -> Artifact:
    """store.obtain with a word to the user; `label` tells artifacts of one stage apart."""
    path = store.path(stage, key)
    if store.find(stage, key) is not None:
        log.info("%s%s: reused, %s", stage, label, path.name)
    return store.obtain(stage, key, make)


def _candidate_from_checkpoint(setting: Setting, checkpoint: Artifact) -> Candidate:
    def load() -> PreTrainedModel:
        checkpoint.verify()
        return load_quantized(checkpoint.path, setting.device, setting.dtype, setting.backend)

    return Candidate(checkpoint.content, load)


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


def _link(link: Path, target: Path) -> None:
    """Point `link` at the artifact, replacing what an earlier run with this tag left."""
    if link.is_symlink() or link.exists():
        link.unlink()
    link.symlink_to(Path("..") / target.relative_to(link.parent.parent))


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


@contextmanager
def _logging_to(path: Path):
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("lqer").setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        # To the file alone, with its traceback: the console gets its one line from the command line's own handler.
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (error,), sys.exc_info()))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
