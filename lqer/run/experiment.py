"""The stages of one run, made from its configuration: which there are, and what each of them is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.checkpoint.load import load_verified, open_verified
from lqer.config.schema import NOT_QUANTIZED, EvaluationConfig
from lqer.evaluation.downstream import task_fingerprint
from lqer.evaluation.perplexity import WINDOWED_PROTOCOLS
from lqer.models.loaders import OpenedModel
from lqer.models.open import load_whole
from lqer.models.source import ModelSource
from lqer.models.streaming import open_model
from lqer.report.environment import device_name
from lqer.run.context import RunContext
from lqer.run.texts import EvaluationText, Texts
from lqer.stages.allocate_ranks import BudgetedPlans, MeasureSpectra, Plans
from lqer.stages.allocate_widths import WidthPlans
from lqer.stages.base import Stage
from lqer.stages.calibrate import Calibrate
from lqer.stages.divergence import OriginalDistributions, WindowDivergence
from lqer.stages.evaluate import (
    Candidate,
    DecodeSpeed,
    DocumentPerplexity,
    Evaluation,
    TaskAccuracy,
    WindowPerplexity,
    task_files,
)
from lqer.stages.finetune import Finetune
from lqer.stages.measure_widths import MeasureWidths, plans_to_measure
from lqer.stages.plans import AnyPlans
from lqer.stages.quantize import Quantize
from lqer.stages.quantize_linears import input_roundings, requested_statistics
from lqer.stages.quantize_sequential import QuantizeSequentially
from lqer.stages.rotate import Rotate
from lqer.store.store import Artifact, Store
from lqer.transforms import BlockTransform

QuantizeStage = Quantize | QuantizeSequentially


@dataclass(frozen=True)
class Experiment:
    """What a run does, in this order; None where the configuration does not ask for a stage.

    calibrate: None also where statistics are gathered by the stages that read them.
    rtn: the checkpoint without low-rank reconstruction. perplexity and downstream: by role of the candidate, in the
    order of the configuration's texts and tasks. distributions: the original's, by text; divergence: that of the other
    candidates from them. Both are empty unless asked for.
    """

    rotate: Rotate | None
    calibrate: Calibrate | None
    spectra: MeasureSpectra | None
    widths: MeasureWidths | None
    quantize: QuantizeStage
    rtn: QuantizeStage | None
    finetune: Finetune | None
    candidates: tuple[Candidate, ...]
    perplexity: dict[str, list[Evaluation]]
    distributions: list[OriginalDistributions]
    divergence: dict[str, list[WindowDivergence]]
    downstream: dict[str, TaskAccuracy]
    decode: dict[str, DecodeSpeed]

    @property
    def checkpoint(self) -> QuantizeStage | Finetune:
        """The stage whose artifact is the result of the run."""
        return self.finetune or self.quantize

    def verify_unread(self, checkpoint: Artifact, store: Store) -> None:
        """Check the files of the result, unless an evaluation is missing, which checks them as it reads them."""
        quantized = (candidate for candidate in self.candidates if candidate.role == "quantized")
        if all(stage.find(store) is not None for candidate in quantized for stage in self.evaluations(candidate)):
            checkpoint.verify()

    def before_quantize(self) -> Iterator[Stage]:
        # Its statistics are those of `calibrate` where there are any.
        measured = self.widths.calibration if self.widths is not None and self.calibrate is None else None
        yield from filter(None, (self.rotate, self.calibrate, self.spectra, measured, self.widths))

    def quantizing(self) -> Iterator[QuantizeStage]:
        yield from filter(None, (self.quantize, self.rtn))

    def evaluations(self, candidate: Candidate) -> Iterator[Stage]:
        """All that a candidate's model is loaded for."""
        if candidate.role == "original":
            yield from self.distributions
        # First those whose pass over the windows finds the losses too.
        yield from self.divergence.get(candidate.role, ())
        yield from self.perplexity[candidate.role]
        yield from (by_role[candidate.role] for by_role in (self.downstream, self.decode) if candidate.role in by_role)

    def paths(self, store: Store) -> dict[str, list[Path]]:
        """The folders of all artifacts, by stage, those of evaluations as "evaluate"; they need not exist yet."""
        paths: dict[str, list[Path]] = {}
        for stage in filter(None, (*self.before_quantize(), *self.quantizing(), self.finetune)):
            paths.setdefault(stage.name, []).append(store.path(stage.name, stage.key))
        measured = [stage for candidate in self.candidates for stage in self.evaluations(candidate)]
        return paths | {"evaluate": [store.path(stage.name, stage.key) for stage in measured]}


def plan_experiment(context: RunContext, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Experiment:
    """The stages of a run. Nothing is built or loaded. Raises ConfigError for tasks that cannot be evaluated."""
    config, device, dtype = context.config, context.device, context.dtype
    model: ModelSource | Rotate = context.source
    if (rotation := config.quantize.model_transform) is not None:
        model = Rotate(context.source, config.seed, device, rotation)
    plans: AnyPlans = context.plans
    if config.quantize.budget_bits is not None:
        plans = _width_plans(context, model, texts, config.quantize.budget_bits)
    calibrate = spectra = None
    quantize: QuantizeStage
    if config.quantize.propagates_error:
        quantize = _sequentially(context, model, texts, plans, tokenizer)
    else:
        gathered = _calibrate(context, model, texts, context.plans, context.keeps_statistics)
        calibrate = gathered if gathered.is_kept else None
        if (budget_bits := config.quantize.low_rank.budget_bits) is not None:
            spectra = MeasureSpectra.of(gathered, context.plans)
            plans = BudgetedPlans(context.plans, spectra, budget_bits, context.summary.linears, context.summary.blocks)
        quantize = Quantize(
            calibration=gathered,
            plans=plans,
            attention=_attention(context),
            seed=config.seed,
            device=device,
            tokenizer=tokenizer,
            label="quantize",
            ranks=context.ranks,
        )
    rtn = _without_low_rank(context, quantize) if "rtn" in config.evaluation.baselines else None
    finetune = None
    if config.finetune is not None:
        assert texts.training_WT is not None, "read_texts reads it where fine-tuning is asked for"
        finetune = Finetune(
            source=context.source,
            checkpoint=quantize,
            windows_WT=texts.training_WT,
            settings=config.finetune.training,
            seed=config.seed,
            dtype=dtype,
            device=device,
            device_map=config.device_map,
        )
    candidates = [_quantized(context, "quantized", finetune or quantize)]
    candidates += [_quantized(context, "rtn", rtn)] if rtn is not None else []
    if "original" in config.evaluation.baselines:
        original = _original(context)
        # First where the others are compared with its distributions, so that two models are never in memory at once.
        first = config.evaluation.divergence is not None
        candidates = [original, *candidates] if first else [*candidates, original]
    perplexity = {candidate.role: _perplexity(context, candidate, tokenizer, texts) for candidate in candidates}
    distributions = _distributions(context, perplexity.get("original", []))
    return Experiment(
        rotate=model if isinstance(model, Rotate) else None,
        calibrate=calibrate,
        spectra=spectra,
        widths=plans.widths if isinstance(plans, WidthPlans) else None,
        quantize=quantize,
        rtn=rtn,
        finetune=finetune,
        candidates=tuple(candidates),
        perplexity=perplexity,
        distributions=distributions,
        divergence=_divergence(distributions, perplexity),
        downstream=_downstream(context, candidates, tokenizer),
        decode=_decode(context, candidates),
    )


def _calibrate(
    context: RunContext, model: ModelSource | Rotate, texts: Texts, plans: Plans, is_kept: bool
) -> Calibrate:
    """The statistics that `plans` need."""
    return Calibrate(
        model=model,
        text=texts.calibration,
        statistics=requested_statistics(plans),
        dtype=context.dtype,
        device=context.device,
        offload=context.offload(),
        roundings=input_roundings(context.plans) if context.config.calibration.round_inputs else None,
        is_kept=is_kept,
        ranks=context.ranks,
    )


def _sequentially(
    context: RunContext, model: ModelSource | Rotate, texts: Texts, plans: AnyPlans, tokenizer: PreTrainedTokenizerBase
) -> QuantizeSequentially:
    config = context.config
    transforms = tuple(part for part in config.quantize.transforms if isinstance(part, BlockTransform))
    return QuantizeSequentially(
        model=model,
        text=texts.calibration,
        plans=plans,
        attention=_attention(context),
        transforms=transforms,
        seed=config.seed,
        dtype=context.dtype,
        device=context.device,
        tokenizer=tokenizer,
        offload=context.offload(),
        label="quantize",
        round_inputs=config.calibration.round_inputs,
        order=config.quantize.order,
        ranks=context.ranks,
    )


def _without_low_rank(context: RunContext, quantize: QuantizeStage) -> QuantizeStage:
    """The same formats without A and B: the baseline `rtn`."""
    plans: AnyPlans
    if isinstance(quantize.plans, WidthPlans):
        plans = replace(quantize.plans, low_rank=False)
    else:
        plans = {name: plan and plan.without_low_rank() for name, plan in context.plans.items()}
    return replace(quantize, plans=plans, label="quantize (without low-rank reconstruction)")


def _width_plans(context: RunContext, model: ModelSource | Rotate, texts: Texts, budget_bits: float) -> WidthPlans:
    """The plans under quantize.budget_bits; losses are measured on the original model, whatever propagates errors."""
    config, choices = context.config, context.choices
    optional_rank = config.quantize.low_rank.optional
    measured = plans_to_measure(context.plans, choices, optional_rank)
    # The same as for quantization where blocks are independent of each other.
    needed = measured if config.quantize.propagates_error else context.plans
    calibrate = _calibrate(context, model, texts, needed, is_kept=True)
    widths = MeasureWidths(
        model=model,
        calibration=calibrate,
        plans=measured,
        formats=tuple(config.formats[name] for name in config.quantize.widths),
        windows_WT=texts.widths_WT,
        batch_size=texts.calibration.batch_size,
        seed=config.seed,
        dtype=context.dtype,
        device=context.device,
        offload=calibrate.offload,
    )
    return WidthPlans(
        plans=context.plans,
        choices=choices,
        widths=widths,
        budget_bits=budget_bits,
        tied=config.quantize.tie_widths,
        low_rank=True,
        shapes=context.summary.linears,
        blocks=context.summary.blocks,
        optional_rank=optional_rank,
    )


def _attention(context: RunContext) -> dict[str, Any] | None:
    quantize = context.config.quantize
    if quantize.attention == NOT_QUANTIZED:
        return None
    return {"format": context.config.formats[quantize.attention].to_dict(), "axis": quantize.attention_axis}


def _arithmetic(context: RunContext) -> dict[str, Any]:
    """What decides a model's outputs besides its weights."""
    return {"dtype": context.dtype, "device": context.device, "blockwise": context.config.evaluation.blockwise}


def _quantized(context: RunContext, role: str, stage: QuantizeStage | Finetune) -> Candidate:
    config = context.config

    def load(store: Store) -> PreTrainedModel | OpenedModel:
        arguments = (stage.artifact(store), context.device, context.dtype, context.backend)
        if config.evaluation.blockwise:
            return open_verified(*arguments, context.offload())
        return load_verified(*arguments, config.device_map, tokens_of_calls(config.evaluation))

    made_from = {"checkpoint": stage, "backend": context.backend, **_arithmetic(context)}
    return Candidate(role, made_from, load)


def tokens_of_calls(evaluation: EvaluationConfig) -> tuple[int, ...]:
    """Of a batch of windows, where nothing else is evaluated; () where calls differ."""
    windows = evaluation.perplexity
    if windows is None or windows.protocol not in WINDOWED_PROTOCOLS:
        return ()
    is_all = evaluation.downstream is None and not evaluation.decode_speed
    return (windows.batch_size * windows.seq_len,) if is_all else ()


def _original(context: RunContext) -> Candidate:
    config = context.config

    def load(store: Store) -> PreTrainedModel | OpenedModel:
        if config.evaluation.blockwise:
            return open_model(context.source, context.dtype, context.device, context.offload())
        return load_whole(context.source, context.dtype, context.device, config.device_map)

    return Candidate("original", {"model": context.source, **_arithmetic(context)}, load)


def _title(text: EvaluationText, protocol: str) -> str:
    return f"{text.spec.label} (protocol {protocol})"


def _perplexity(
    context: RunContext, candidate: Candidate, tokenizer: PreTrainedTokenizerBase, texts: Texts
) -> list[Evaluation]:
    settings = context.config.evaluation.perplexity
    if settings is None:
        return []
    stages: list[Evaluation] = []
    for text in texts.evaluation:
        title = _title(text, settings.protocol)
        if text.windows_WT is None:
            stages.append(
                DocumentPerplexity(candidate, title, text.documents, settings.seq_len, settings.batch_size, tokenizer)
            )
        else:
            stages.append(WindowPerplexity(candidate, title, settings.protocol, text.windows_WT, settings.batch_size))
    return stages


def _distributions(context: RunContext, original: list[Evaluation]) -> list[OriginalDistributions]:
    """Those of the original, on the windows of its perplexities."""
    if (settings := context.config.evaluation.divergence) is None:
        return []
    windowed = [one for one in original if isinstance(one, WindowPerplexity)]
    return [
        OriginalDistributions(one.candidate, one.windows_WT, one.batch_size, settings.top_k, one, one.title)
        for one in windowed
    ]


def _divergence(
    distributions: list[OriginalDistributions], perplexity: dict[str, list[Evaluation]]
) -> dict[str, list[WindowDivergence]]:
    """Of the others, in the same order of texts."""
    if not distributions:
        return {}
    windowed = {
        role: [one for one in stages if isinstance(one, WindowPerplexity)]
        for role, stages in perplexity.items()
        if role != "original"
    }
    return {
        role: [
            WindowDivergence(own.candidate, stage.title, stage, own.protocol, own)
            for stage, own in zip(distributions, stages, strict=True)
        ]
        for role, stages in windowed.items()
    }


def _downstream(
    context: RunContext, candidates: list[Candidate], tokenizer: PreTrainedTokenizerBase
) -> dict[str, TaskAccuracy]:
    settings = context.config.evaluation.downstream
    if settings is None:
        return {}
    tasks = task_fingerprint(task_files(settings))
    return {
        candidate.role: TaskAccuracy(
            candidate=candidate,
            title=", ".join(settings.tasks),
            tasks=tasks,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            seed=context.config.seed,
            settings=settings,
            tokenizer=tokenizer,
        )
        for candidate in candidates
    }


def _decode(context: RunContext, candidates: list[Candidate]) -> dict[str, DecodeSpeed]:
    """Of the original and, on kernels, of the checkpoint: emulation decodes weights anew for every token."""
    config = context.config
    on_one_gpu = context.device.type == "cuda" and config.device_map == "single" and not config.evaluation.blockwise
    if not config.evaluation.decode_speed or not on_one_gpu:
        return {}
    roles = {"original", "quantized"} if context.backend == "triton" else {"original"}
    hardware = device_name(context.device)
    return {one.role: DecodeSpeed(one, hardware, hardware) for one in candidates if one.role in roles}
