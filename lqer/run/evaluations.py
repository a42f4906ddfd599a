"""What a run evaluates: the candidates, and the stages that measure each of them.

A candidate is a model by its role, loaded when the first of its evaluations is missing.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.checkpoint.load import load_verified, open_verified
from lqer.config.evaluation import EvaluationConfig
from lqer.evaluation.downstream import task_fingerprint
from lqer.evaluation.perplexity import WINDOWED_PROTOCOLS
from lqer.models.loaders import OpenedModel
from lqer.models.open import load_whole
from lqer.models.streaming import open_model
from lqer.report.environment import device_name
from lqer.run.context import RunContext
from lqer.run.texts import EvaluationText, Texts
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
from lqer.stages.quantize import Quantize
from lqer.stages.quantize_sequential import QuantizeSequentially
from lqer.store.store import Store


def _arithmetic(context: RunContext) -> dict[str, Any]:
    """What decides a model's outputs besides its weights."""
    return {"dtype": context.dtype, "device": context.device, "blockwise": context.config.evaluation.blockwise}


def quantized_candidate(context: RunContext, role: str, stage: Quantize | QuantizeSequentially | Finetune) -> Candidate:
    """The model of a stage's checkpoint, on the backend of the run."""
    config = context.config

    def load(store: Store) -> PreTrainedModel | OpenedModel:
        arguments = (stage.artifact(store), context.device, context.dtype, context.backend)
        if config.evaluation.blockwise:
            return open_verified(*arguments, context.offload())
        return load_verified(*arguments, config.device_map, tokens_of_calls(config.evaluation))

    made_from = {"checkpoint": stage, "backend": context.backend, **_arithmetic(context)}
    return Candidate(role, made_from, load)


def tokens_of_calls(evaluation: EvaluationConfig) -> tuple[int, ...]:
    """The tokens of each call, a batch of windows where nothing else is evaluated; () where calls differ."""
    windows = evaluation.perplexity
    if windows is None or windows.protocol not in WINDOWED_PROTOCOLS:
        return ()
    is_all = evaluation.downstream is None and not evaluation.decode_speed
    return (windows.batch_size * windows.seq_len,) if is_all else ()


def original_candidate(context: RunContext) -> Candidate:
    """The model as it was before quantization and transforms."""
    config = context.config

    def load(store: Store) -> PreTrainedModel | OpenedModel:
        if config.evaluation.blockwise:
            return open_model(context.source, context.dtype, context.device, context.offload())
        return load_whole(context.source, context.dtype, context.device, config.device_map)

    return Candidate("original", {"model": context.source, **_arithmetic(context)}, load)


def _title(text: EvaluationText, protocol: str) -> str:
    return f"{text.spec.label} (protocol {protocol})"


def perplexities(
    context: RunContext, candidate: Candidate, tokenizer: PreTrainedTokenizerBase, texts: Texts
) -> list[Evaluation]:
    """The perplexities of a candidate, in the order of the configuration's texts."""
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


def original_distributions(context: RunContext, original: list[Evaluation]) -> list[OriginalDistributions]:
    """The distributions of the original, on the windows of its perplexities."""
    if (settings := context.config.evaluation.divergence) is None:
        return []
    windowed = [one for one in original if isinstance(one, WindowPerplexity)]
    return [
        OriginalDistributions(one.candidate, one.windows_WT, one.batch_size, settings.top_k, one, one.title)
        for one in windowed
    ]


def divergences(
    distributions: list[OriginalDistributions], perplexity: dict[str, list[Evaluation]]
) -> dict[str, list[WindowDivergence]]:
    """The divergences of the other candidates from the original, by role, in the same order of texts."""
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


def task_accuracies(
    context: RunContext, candidates: list[Candidate], tokenizer: PreTrainedTokenizerBase
) -> dict[str, TaskAccuracy]:
    """The accuracies by role of the candidate, of all tasks together."""
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


def decode_speeds(context: RunContext, candidates: list[Candidate]) -> dict[str, DecodeSpeed]:
    """The speeds of the original and, on kernels, of the checkpoint: emulation decodes weights anew for every token."""
    config = context.config
    on_one_gpu = context.device.type == "cuda" and config.device_map == "single" and not config.evaluation.blockwise
    if not config.evaluation.decode_speed or not on_one_gpu:
        return {}
    roles = {"original", "quantized"} if context.backend == "triton" else {"original"}
    hardware = device_name(context.device)
    return {one.role: DecodeSpeed(one, hardware, hardware) for one in candidates if one.role in roles}
