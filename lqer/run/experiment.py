"""The stages of one run, made from its configuration: which there are, and what each of them is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lqer.config.schema import NOT_QUANTIZED
from lqer.models.source import ModelSource
from lqer.run.context import RunContext
from lqer.run.evaluations import (
    decode_speeds,
    divergences,
    original_candidate,
    original_distributions,
    perplexities,
    quantized_candidate,
    task_accuracies,
)
from lqer.run.texts import Texts
from lqer.stages.allocate_ranks import RankPlans
from lqer.stages.allocate_widths import WidthPlans
from lqer.stages.base import Stage
from lqer.stages.calibrate import Calibrate
from lqer.stages.divergence import OriginalDistributions, WindowDivergence
from lqer.stages.evaluate import Candidate, DecodeSpeed, Evaluation, TaskAccuracy
from lqer.stages.finetune import Finetune
from lqer.stages.measure_spectra import MeasureSpectra
from lqer.stages.measure_widths import MeasureWidths, plans_to_measure
from lqer.stages.plans import AnyPlans, Plans
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
            plans = RankPlans(context.plans, spectra, budget_bits, context.summary.linears, context.summary.blocks)
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
    candidates = [quantized_candidate(context, "quantized", finetune or quantize)]
    candidates += [quantized_candidate(context, "rtn", rtn)] if rtn is not None else []
    if "original" in config.evaluation.baselines:
        original = original_candidate(context)
        # First where the others are compared with its distributions, so that two models are never in memory at once.
        first = config.evaluation.divergence is not None
        candidates = [original, *candidates] if first else [*candidates, original]
    perplexity = {candidate.role: perplexities(context, candidate, tokenizer, texts) for candidate in candidates}
    distributions = original_distributions(context, perplexity.get("original", []))
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
        divergence=divergences(distributions, perplexity),
        downstream=task_accuracies(context, candidates, tokenizer),
        decode=decode_speeds(context, candidates),
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
