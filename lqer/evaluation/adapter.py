"""A model behind lm-evaluation-harness's interface: in memory, or run block by block. The library is imported here.

Shapes: B requests of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lqer.evaluation.logits import window_logits
from lqer.evaluation.progress import progress_bar
from lqer.evaluation.requests import Request, Score, Scores, request_units, unit_name
from lqer.models.loaders import OpenedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without quantization_config, which the library would look up in transformers for a model it is given."""
    config = copy.deepcopy(config)
    config.quantization_config = None
    return config


class Adapter(HFLM):
    """Scores requests in units, under one progress bar per task list instead of one per batch."""

    scores: Scores
    requests_per_batch: int
    # Lists of requests that have been scored.
    calls = 0

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        return without_quantization(self._config)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        if self.scores.share is not None:
            return [0.0] * len(requests)
        with progress_bar(not disable_tqdm)(desc="perplexity", unit="window") as self.rolling_bar:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        if self.scores.share is not None:
            return [""] * len(requests)
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        if override_bs is not None:
            # Windows of a document.
            scored = super()._loglikelihood_tokens(requests, True, override_bs)
            self.rolling_bar.update(len(scored))
            return scored
        units = {
            unit_name(self.calls, unit): (unit, places)
            for unit, places in enumerate(request_units(requests, self.requests_per_batch))
        }
        self.calls += 1
        wanted = {
            name: [requests[place] for place in places]
            for name, (unit, places) in units.items()
            if self.scores.wants(name, unit)
        }
        with progress_bar(not disable_tqdm)(total=len(requests), desc="tasks", unit="request") as bar:
            bar.update(len(requests) - sum(map(len, wanted.values())))
            for name, scored in self.scored(wanted):
                self.scores.found[name] = scored
                bar.update(len(scored))
        answers: list[Score] = [(0.0, False)] * len(requests)
        for name, (_, places) in units.items():
            for place, answer in zip(places, self.scores.found.get(name, ())):
                answers[place] = answer
        return answers

    def scored(self, units: Mapping[str, list[Request]]) -> Iterator[tuple[str, list[Score]]]:
        """The scores of each unit's requests."""
        for name, of_unit in units.items():
            yield name, super()._loglikelihood_tokens(of_unit, disable_tqdm=True)


class BlockwiseAdapter(Adapter):
    """The adapter of a model that is run block by block, which needs all batches at once.

    The library calls a model batch by batch. So it goes through the requests twice: the first time it gets zeros and
    its batches are noted, which then go through the blocks together; the second time it gets their logits.
    """

    opened: OpenedModel
    _noted: list[Tensor]
    _answers: Iterator[Tensor] | None = None

    def scored(self, units: Mapping[str, list[Request]]) -> Iterator[tuple[str, list[Score]]]:
        self._noted, self._answers = [], None
        for _ in super().scored(units):
            pass
        if self._noted:
            logits_of = window_logits(self.opened, self._noted, "tasks", True)
            self._answers = map(logits_of, itertools.count())
            yield from super().scored(units)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._answers is not None:
            return next(self._answers)
        self._noted.append(inps.cpu())
        size = self.opened.model.config.get_text_config().vocab_size
        return torch.zeros((), device=inps.device).expand(*inps.shape, size)


def adapter_of(
    model: PreTrainedModel | OpenedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
    scores: Scores,
) -> Adapter:
    """The model behind the library's interface, with log-probabilities in float32 for every dtype of the model.

    In bfloat16, the library's default for a bfloat16 model, log-probabilities of answers would tie at steps of 1/16.
    scores: see `harness.evaluate`.
    """
    # A copy, because the library sets a padding token; without a length limit, because documents longer than the
    # model's context are cut into windows before they reach the model.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = sys.maxsize
    settings: dict[str, Any] = {
        "tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length, "softmax_dtype": torch.float32
    }  # fmt: skip
    adapter: Adapter
    if isinstance(model, OpenedModel):
        adapter = BlockwiseAdapter(pretrained=model.model, **settings)
        # Not that of its parameters, which have no values yet.
        adapter._device, adapter.opened = model.device, model
    else:
        adapter = Adapter(pretrained=model, **settings)
    adapter.scores, adapter.requests_per_batch = scores, batch_size
    return adapter
