"""The stages of one run, made from its configuration: which there are, and what each of them is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lqer.config.quantize import NOT_QUANTIZED
from lqer.methods import Plans
from lqer.models.source import ModelSource
from lqer.resources.machine import usable_ram
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
from lqer.run.experiment import Experiment, QuantizeStage
from lqer.run.texts import Texts
from lqer.stages.allocate_ranks import RankPlans
from lqer.stages.allocate_widths import WidthPlans
from lqer.stages.calibrate import Calibrate
from lqer.stages.evaluate import Candidate
from lqer.stages.finetune import Finetune
from lqer.stages.gather import CalibrationText
from lqer.stages.measure_spectra import MeasureSpectra
from lqer.stages.measure_widths import MeasureWidths, plans_to_measure
from lqer.stages.plans import AnyPlans
from lqer.stages.quantize import Quantize
from lqer.stages.quantize_linears import input_roundings, requested_statistics
from lqer.stages.quantize_sequential import QuantizeSequentially
from lqer.stages.rotate import Rotate
from lqer.stages.weigh_tokens import WeighTokens, batches_of_a_pass
from lqer.transforms import BlockTransform


def plan_experiment(context: RunContext, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Experiment:
    """The stages of a run. Nothing is built or loaded. Raises ConfigError for tasks that cannot be evaluated."""
    config, model = context.config, _model(context)
    token_weights = _token_weights(context, model, texts.calibration)
    texts = replace(texts, calibration=replace(texts.calibration, gradient_weights=token_weights))
    plans = _plans(context, texts)
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
        quantize = _independently(context, gathered, plans, tokenizer)
    rtn = _without_low_rank(context, quantize) if "rtn" in config.evaluation.baselines else None
    finetune = _finetune(context, quantize, texts)
    candidates = _candidates(context, finetune or quantize, rtn)
    perplexity = {candidate.role: perplexities(context, candidate, tokenizer, texts) for candidate in candidates}
    distributions = original_distributions(context, perplexity.get("original", []))
    return Experiment(
        rotate=model if isinstance(model, Rotate) else None,
        token_weights=token_weights,
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


def _model(context: RunContext) -> ModelSource | Rotate:
    """What is calibrated and quantized: the model, or its rotation."""
    if (rotation := context.config.quantize.model_transform) is None:
        return context.source
    return Rotate(context.source, context.config.seed, context.device, rotation)


def _token_weights(context: RunContext, model: ModelSource | Rotate, text: CalibrationText) -> WeighTokens | None:
    """The weights of the tokens by the gradient, where these are asked for."""
    if text.token_weights != "gradient":
        return None
    summary, batch_tokens = context.summary, text.batch_size * text.windows_WT.shape[1]
    return WeighTokens(
        model=model,
        windows_WT=text.windows_WT,
        batch_size=text.batch_size,
        seed=context.config.seed,
        dtype=context.dtype,
        device=context.device,
        offload=context.offload(),
        at_once=batches_of_a_pass(
            summary.blocks, summary.hidden_size, batch_tokens, context.dtype.itemsize, usable_ram()
        ),
    )


def _plans(context: RunContext, texts: Texts) -> AnyPlans:
    """The plans; under quantize.budget_bits, those whose formats follow from it."""
    budget_bits = context.config.quantize.budget_bits
    return context.plans if budget_bits is None else _width_plans(context, texts, budget_bits)


def _candidates(context: RunContext, result: QuantizeStage | Finetune, rtn: QuantizeStage | None) -> list[Candidate]:
    """The models that are evaluated, in their order."""
    candidates = [quantized_candidate(context, "quantized", result)]
    candidates += [quantized_candidate(context, "rtn", rtn)] if rtn is not None else []
    if "original" not in context.config.evaluation.baselines:
        return candidates
    original = original_candidate(context)
    # First where the others are compared with its distributions, so that two models are never in memory at once.
    first = context.config.evaluation.divergence is not None
    return [original, *candidates] if first else [*candidates, original]


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
    """Every block on the inputs that the quantized blocks before it compute."""
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


def _independently(
    context: RunContext, calibrate: Calibrate, plans: AnyPlans, tokenizer: PreTrainedTokenizerBase
) -> Quantize:
    """Every block on the inputs that reach it in the original model."""
    return Quantize(
        calibration=calibrate,
        plans=plans,
        attention=_attention(context),
        seed=context.config.seed,
        device=context.device,
        tokenizer=tokenizer,
        label="quantize",
        ranks=context.ranks,
    )


def _without_low_rank(context: RunContext, quantize: QuantizeStage) -> QuantizeStage:
    """The same formats without A and B: the baseline `rtn`. A scheme without them is its own."""
    plans: AnyPlans
    if all(plan is None or plan.rank == 0 for plan in context.plans.values()):
        plans = quantize.plans
    elif isinstance(quantize.plans, WidthPlans):
        plans = replace(quantize.plans, low_rank=False)
    else:
        plans = {name: plan and plan.without_low_rank() for name, plan in context.plans.items()}
    return replace(quantize, plans=plans, label="quantize (without low-rank reconstruction)")


def _finetune(context: RunContext, quantize: QuantizeStage, texts: Texts) -> Finetune | None:
    config = context.config
    if config.finetune is None:
        return None
    assert texts.training_WT is not None, "read_texts reads it where fine-tuning is asked for"
    return Finetune(
        source=context.source,
        checkpoint=quantize,
        windows_WT=texts.training_WT,
        settings=config.finetune.training,
        seed=config.seed,
        dtype=context.dtype,
        device=context.device,
        device_map=config.device_map,
    )


def _width_plans(context: RunContext, texts: Texts, budget_bits: float) -> WidthPlans:
    """The plans under quantize.budget_bits; losses are measured on the original model, whatever propagates errors."""
    config, choices, model = context.config, context.choices, _model(context)
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
