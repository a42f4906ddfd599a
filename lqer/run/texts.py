"""Reads every text of a run before any work is done, so that one that cannot be used costs nothing.

Shapes: W windows, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lqer.config import Config
from lqer.config.evaluation import PerplexityConfig
from lqer.data.datasets import DatasetSpec, calibration_windows, load_rows, tokens_sha256
from lqer.data.overlap import shared_tokens
from lqer.data.pairs import holds_pairs, pair_windows
from lqer.errors import DataError
from lqer.evaluation.perplexity import WINDOWED_PROTOCOLS
from lqer.results import CalibrationInfo
from lqer.stages.base import identity
from lqer.stages.gather import CalibrationText
from lqer.stages.gather_experts import ExpertTokens
from lqer.stages.measure_widths import WINDOWS
from lqer.store.files import content_hash

# Share of the smaller text from which two texts overlap: below, they have phrases in common.
LEAST_SHARED = 0.01


@dataclass(frozen=True)
class EvaluationText:
    """A text of [evaluation.perplexity]: its token windows, or its documents where the protocol scores those.

    source: repository, revision, split and rows, or file.
    """

    spec: DatasetSpec
    source: str
    windows_WT: Tensor | None
    documents: tuple[str, ...] = ()

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """All token ids, in order."""
        if self.windows_WT is not None:
            return self.windows_WT.flatten()
        ids = [tokenizer(document, verbose=False)["input_ids"] for document in self.documents]
        return torch.tensor([token for document in ids for token in document], dtype=torch.int64)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens or documents."""
        return content_hash(self.documents) if self.windows_WT is None else tokens_sha256(self.windows_WT)


@dataclass(frozen=True)
class Texts:
    """widths_WT: the windows that widths are measured on, of the calibration text or behind it (quantize.widths_text).
    training_WT: the windows of fine-tuning, the last of them held out; None without fine-tuning.

    overlaps: a warning for each pair of a text that is learned from and one that is evaluated, if they share tokens.
    """

    calibration: CalibrationText
    calibration_info: CalibrationInfo
    widths_WT: Tensor
    training_WT: Tensor | None
    evaluation: tuple[EvaluationText, ...]
    overlaps: tuple[str, ...]


def read_texts(config: Config, tokenizer: PreTrainedTokenizerBase, processor: Any = None) -> Texts:
    """processor: transformers' for images and texts, where there are images.

    Raises DataError, which names the key, for a text that cannot be read or is too short.
    """
    with _asked_by("calibration.dataset"):
        calibration, info, widths_WT = _calibration(config, tokenizer, processor)
    with _asked_by("finetune.dataset"):
        training_WT = _training(config, tokenizer)
    perplexity = config.evaluation.perplexity
    evaluation = () if perplexity is None else tuple(_evaluations(perplexity, tokenizer))
    calibrated = [calibration.windows_WT, *([widths_WT] if config.quantize.widths_text == "unseen" else [])]
    learned = {"calibration": torch.cat(calibrated)} | ({} if training_WT is None else {"fine-tuning": training_WT})
    overlaps = [
        _overlap(name, windows_WT.flatten(), text.spec.label, text.tokens(tokenizer))
        for name, windows_WT in learned.items()
        for text in evaluation
    ]
    return Texts(calibration, info, widths_WT, training_WT, evaluation, tuple(filter(None, overlaps)))


@contextmanager
def _asked_by(key: str) -> Iterator[None]:
    """Name the key of the configuration in the line about a text."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{key}: {error}") from error


def _overlap(learned_as: str, learned_T: Tensor, label: str, evaluated_T: Tensor) -> str | None:
    """A line about the tokens that both texts share; None for less than the stock phrases that texts may have."""
    shared = shared_tokens(learned_T.numpy(), evaluated_T.numpy())
    if shared < LEAST_SHARED * min(len(learned_T), len(evaluated_T)):
        return None
    return (
        f"{shared} of the {len(learned_T)} {learned_as} tokens are also in the evaluated text {label}: its numbers "
        "flatter the quantized model (rows = ':50%' and '50%:' are two halves of one text)"
    )


def _calibration(
    config: Config, tokenizer: PreTrainedTokenizerBase, processor: Any
) -> tuple[CalibrationText, CalibrationInfo, Tensor]:
    """The text, its facts, and the windows that widths are measured on."""
    settings, unseen = config.calibration, config.quantize.widths_text == "unseen"
    beside: tuple[Mapping[str, Tensor], ...] = ()
    if processor is not None and holds_pairs(settings.dataset):
        _refuse_pairs(config)
        pairs = pair_windows(processor, settings.dataset, settings.num_samples, settings.seq_len)
        read_WT, beside, source = pairs.windows_WT, pairs.beside, f"{settings.dataset.label}, with its images"
    else:
        rows = load_rows(settings.dataset, "calibration")
        source = rows.source
        count, asked_by = settings.num_samples, "calibration.num_samples"
        if unseen:
            count, asked_by = count + WINDOWS, f'{asked_by} + {WINDOWS} (quantize.widths_text = "unseen")'
        read_WT = calibration_windows(tokenizer, rows, count, settings.seq_len, asked_by)
    windows_WT = read_WT[: settings.num_samples]
    widths_WT = read_WT[settings.num_samples :] if unseen else windows_WT[:WINDOWS]
    tokens = tokens_sha256(windows_WT)
    info = CalibrationInfo(
        dataset=settings.dataset.label,
        source=source,
        tokens=windows_WT.numel(),
        fingerprint=content_hash([tokens, identity(beside)]) if beside else tokens,
    )
    experts = ExpertTokens(settings.experts, settings.min_expert_tokens)
    text = CalibrationText(
        windows_WT, settings.batch_size, settings.error_tokens, settings.token_weights, experts, beside
    )
    return text, info, widths_WT


def _refuse_pairs(config: Config) -> None:
    """Raise DataError for what is learned on token ids alone, or on blocks whose positions differ between windows."""
    learned = {
        "quantize.widths": config.quantize.widths,
        "quantize": config.quantize.block_parts,
        "calibration.token_weights": config.calibration.token_weights == "gradient",
    }
    if (key := next((key for key, parts in learned.items() if parts), None)) is not None:
        raise DataError(
            f"{config.calibration.dataset.label} holds images; {key}: widths and weights of tokens by a gradient, and "
            "transforms and roundings of whole blocks, are learned on text"
        )


def _training(config: Config, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    settings = config.finetune
    if settings is None:
        return None
    windows = settings.num_samples + settings.validation_samples
    asked_by = "finetune.num_samples + validation_samples"
    return calibration_windows(
        tokenizer, load_rows(settings.dataset, "calibration"), windows, settings.seq_len, asked_by
    )


def _evaluations(settings: PerplexityConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[EvaluationText]:
    for index, spec in enumerate(settings.datasets):
        with _asked_by(f"evaluation.perplexity.datasets[{index}]"):
            yield _evaluation(spec, settings, tokenizer)


def _evaluation(spec: DatasetSpec, settings: PerplexityConfig, tokenizer: PreTrainedTokenizerBase) -> EvaluationText:
    text = load_rows(spec, "evaluation")
    if settings.protocol == "lm-eval":
        # The lines of a running text are not documents: scored one by one they would lose their context.
        documents = tuple(text.rows) if text.documents else (text.joiner.join(text.rows),)
        return EvaluationText(spec, text.source, None, documents)
    windows_WT = WINDOWED_PROTOCOLS[settings.protocol].windows(tokenizer, text.rows, text.joiner, settings.seq_len)
    return EvaluationText(spec, text.source, windows_WT[: settings.max_windows])
