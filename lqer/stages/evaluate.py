"""Stage "evaluate": every candidate model on every dataset and task, each result an artifact of its own.

A result is named after the model's content, the very tokens or task files it was measured on, and the protocol; so the
original is evaluated once however many schemes are compared with it. A model is loaded once, if any of its results is
missing, and let go before the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.config.schema import DownstreamConfig, EvaluationConfig, PerplexityConfig
from lqer.data.datasets import DatasetSpec, load_rows, tokens_sha256
from lqer.evaluation.downstream import evaluate_tasks, task_fingerprint
from lqer.evaluation.perplexity import WINDOWED_PROTOCOLS, lm_eval_perplexity
from lqer.models.loaders import OpenedModel
from lqer.results import DownstreamRow, PerplexityRow
from lqer.store.files import content_hash
from lqer.store.store import Artifact, Store, Workspace

log = logging.getLogger(__name__)

# Raised whenever the same model and text would give another number than before.
EVALUATE_VERSION = 1
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Candidate:
    """A model to be evaluated: what its results are named after, and how it is loaded, or opened block by block."""

    content: str
    load: Callable[[], PreTrainedModel | OpenedModel]


@dataclass(frozen=True)
class Job:
    """One measurement: what decides its outcome beside the model, and how it is made. The result is JSON-able."""

    stage: str
    label: str
    key: Mapping[str, Any]
    measure: Callable[[Any], Any]


@dataclass(frozen=True)
class Evaluation:
    """The rows of results.json and the seconds that making them took."""

    perplexity: list[PerplexityRow]
    downstream: list[DownstreamRow]
    seconds: float


def evaluate(
    settings: EvaluationConfig,
    candidates: Mapping[str, Candidate],
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    arithmetic: Mapping[str, str],
    seed: int,
) -> Evaluation:
    """Measure all `candidates` ("quantized" and, where asked for, "original" and "plain").

    arithmetic: dtype, device and backend, part of every result's name. Raises DataError or ConfigError where a text or
    task cannot be had.
    """
    texts = [_perplexity_job(settings.perplexity, spec, tokenizer) for spec in _datasets(settings.perplexity)]
    tasks = [] if settings.downstream is None else [_downstream_job(settings.downstream, tokenizer, seed)]
    found: dict[str, dict[str, Artifact]] = {
        kind: _evaluate_one(kind, candidate, [*(job for job, _ in texts), *tasks], store, arithmetic)
        for kind, candidate in candidates.items()
    }
    perplexity = [
        _perplexity_row(spec, source, {kind: results[job.label].json(RESULT_FILE) for kind, results in found.items()})
        for spec, (job, source) in zip(_datasets(settings.perplexity), texts, strict=True)
    ]
    downstream = [
        row
        for job in tasks
        for row in _downstream_rows({kind: results[job.label].json(RESULT_FILE) for kind, results in found.items()})
    ]
    seconds = sum(artifact.seconds for results in found.values() for artifact in results.values())
    return Evaluation(perplexity, downstream, round(seconds, 3))


def _datasets(settings: PerplexityConfig | None) -> tuple[DatasetSpec, ...]:
    return () if settings is None else settings.datasets


def _evaluate_one(
    kind: str, candidate: Candidate, jobs: list[Job], store: Store, arithmetic: Mapping[str, str]
) -> dict[str, Artifact]:
    model: PreTrainedModel | OpenedModel | None = None
    artifacts = {}
    for job in jobs:
        key = {"version": EVALUATE_VERSION, "model": candidate.content, "arithmetic": arithmetic, **job.key}

        def make(workspace: Workspace, job: Job = job) -> None:
            nonlocal model
            log.info("evaluate the %s model: %s", kind, job.label)
            model = model or candidate.load()
            workspace.write_json(RESULT_FILE, job.measure(model))

        if store.find(job.stage, key) is not None:
            log.info("evaluate the %s model: %s reused", kind, job.label)
        artifacts[job.label] = store.obtain(job.stage, key, make)
    return artifacts


def _perplexity_job(
    settings: PerplexityConfig | None, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[Job, str]:
    """The job of one dataset, and the description of its text."""
    assert settings is not None
    text = load_rows(spec, "evaluation")
    key: dict[str, Any] = {
        "protocol": settings.protocol,
        "seq_len": settings.seq_len,
        "batch_size": settings.batch_size,
    }
    if settings.protocol == "lm-eval":
        # Lines of a running text are no documents: scored one by one they would lose their context.
        documents = list(text.rows) if text.documents else [text.joiner.join(text.rows)]
        key["documents"] = content_hash(documents)

        def measure(model: Any) -> Any:
            return asdict(lm_eval_perplexity(model, tokenizer, documents, settings.seq_len, settings.batch_size))

    else:
        protocol = WINDOWED_PROTOCOLS[settings.protocol]
        windows_WT = protocol.windows(tokenizer, text.rows, text.joiner, settings.seq_len)[: settings.max_windows]
        key["tokens"] = tokens_sha256(windows_WT)

        def measure(model: Any) -> Any:
            return asdict(protocol.perplexity(model, windows_WT, settings.batch_size, True))

    return Job("perplexity", f"{spec.label} ({settings.protocol})", key, measure), text.source


def _downstream_job(settings: DownstreamConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Job:
    include_path = None if settings.include_path is None else Path(settings.include_path)
    data_dir = None if settings.data_dir is None else Path(settings.data_dir)
    tasks = list(settings.tasks)

    def measure(model: PreTrainedModel) -> Any:
        results = evaluate_tasks(
            model,
            tokenizer,
            tasks,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            include_path=include_path,
            data_dir=data_dir,
            seed=seed,
        )
        return [asdict(result) for result in results]

    key = {
        "tasks": task_fingerprint(tasks, include_path, data_dir),
        "settings": settings.model_dump(mode="json", exclude={"include_path", "data_dir"}),
        "seed": seed,
    }
    return Job("downstream", ", ".join(tasks), key, measure)


def _perplexity_row(spec: DatasetSpec, source: str, results: Mapping[str, Mapping[str, Any]]) -> PerplexityRow:
    quantized = results["quantized"]
    values = {kind: result["perplexity"] for kind, result in results.items()}
    return PerplexityRow(
        dataset=spec.label,
        source=source,
        protocol=quantized["protocol"],
        seq_len=quantized["seq_len"],
        tokens=quantized["tokens"],
        original=values.get("original"),
        plain=values.get("plain"),
        quantized=values["quantized"],
    )


def _downstream_rows(results: Mapping[str, list[Mapping[str, Any]]]) -> list[DownstreamRow]:
    values = {kind: {(row["task"], row["metric"]): row["value"] for row in rows} for kind, rows in results.items()}
    return [
        DownstreamRow(
            task=row["task"],
            metric=row["metric"],
            original=values.get("original", {}).get((row["task"], row["metric"])),
            plain=values.get("plain", {}).get((row["task"], row["metric"])),
            quantized=row["value"],
            stderr=row["stderr"],
            num_fewshot=row["num_fewshot"],
            samples=row["samples"],
        )
        for row in results["quantized"]
    ]
