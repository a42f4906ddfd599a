"""The interface to lm-evaluation-harness: its task index and scoring; for the model, see adapter.py.

The library takes seconds to import and about a dozen more to read the YAMLs of its own tasks. So it is imported inside
functions, and its own tasks are read only if a name is not found in the local folder.

A local task is a YAML with `custom_dataset: !function lqer.evaluation.harness.load_jsonl` and
`dataset_kwargs.data_files`, one JSON-lines file per split relative to `evaluation.downstream.data_dir`. That folder
is passed to the loader as task metadata, so the same YAMLs work with the library's own command line, given
`--metadata '{"data_dir": ...}'`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqer.errors import ConfigError, DataError, HubTextError
from lqer.evaluation.requests import Scores
from lqer.evaluation.task_code import LOCAL_LOADER, sandbox_templates, trusted_code_alone

if TYPE_CHECKING:
    import datasets
    from lm_eval.api.task import Task
    from lm_eval.result_schema import EvalResults
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lqer.models.loaders import OpenedModel

# Bootstrap resamples for the standard error of a metric that is not a mean; 1000 give it to about 2%.
BOOTSTRAP_RESAMPLES = 1000


@dataclass(frozen=True)
class RollingScore:
    """The library's totals over all documents of a perplexity task."""

    log_likelihood: float  # nats, summed
    words: int  # by the task's own count
    tokens: int
    windows: int


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log only the library's errors and redirect its prints to stderr; progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def task_manager(tasks: Sequence[str], include_path: Path | None, data_dir: Path | None) -> TaskManager:
    """The index that contains all of `tasks`; a local task replaces the library's task of the same name.

    Raises ConfigError for an unknown name, with the nearest one, and for an `include_path` that is not a folder.
    """
    if include_path is not None:
        include_path = include_path.resolve()
        if not include_path.is_dir():
            raise ConfigError(f"evaluation.downstream.include_path must be a folder: found {str(include_path)!r}")
        local = _index(include_path, data_dir, library_tasks=False)
        if set(tasks) <= set(local.all_subtasks):
            return local
    manager = _index(include_path, data_dir, library_tasks=True)
    for task in tasks:
        if task not in manager.task_index:
            nearest = difflib.get_close_matches(task, manager.all_tasks, n=1, cutoff=0)
            raise ConfigError(f"evaluation.downstream.tasks: unknown task {task!r}; the nearest is {nearest[0]!r}")
    return manager


@functools.cache
def _index(include_path: Path | None, data_dir: Path | None, library_tasks: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {"data_dir": str(data_dir)} if data_dir is not None else {}
    with _quiet():
        return TaskManager(include_path=include_path, include_defaults=library_tasks, metadata=metadata)


def entries(manager: TaskManager, name: str) -> dict[str, Entry]:
    """The index entries of a name: a task; a group and all its members; the tasks of a tag.

    Tasks that a group defines in its own YAML have no entry.
    """
    entry = manager.task_index.get(name)
    if entry is None:
        return {}
    config = entry.cfg or {}
    found = {} if entry.kind.name == "TAG" else {name: entry}
    members = sorted(entry.tags) if entry.kind.name == "TAG" else config["task"] if "group" in config else []
    for member in members:
        member_name = member if isinstance(member, str) else member.get("group") or member["task"]
        found |= entries(manager, member_name)
    return found


def data_files(entry: Entry) -> list[str]:
    """The files under data_dir that a local task reads; none for any other task."""
    config = entry.cfg or {}
    if not str(config.get("custom_dataset", "")).endswith(LOCAL_LOADER):
        return []
    return list(config["dataset_kwargs"]["data_files"].values())


def load_jsonl(data_files: dict[str, str], data_dir: str | None = None, **metadata: Any) -> datasets.DatasetDict:
    """The dataset of a local task: one JSON object per line, in memory, so that no cache can become stale.

    `data_files` maps a split to a path relative to `data_dir`; the library also passes the task's other metadata.
    """
    import datasets

    splits = {}
    for split, name in data_files.items():
        path = jsonl_path(name, data_dir)
        try:
            with path.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
            splits[split] = datasets.Dataset.from_list(rows)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} must hold one JSON object per line, all with the same fields: {error}") from error
        if not rows:
            raise DataError(f"{path} must hold at least one row")
    return datasets.DatasetDict(splits)


def jsonl_path(name: str, data_dir: str | Path | None) -> Path:
    """The path of a local task's file. Raises ConfigError if data_dir is not set or the file is missing."""
    if data_dir is None:
        raise ConfigError(f"evaluation.downstream.data_dir must be set: a task reads {name!r} under it")
    path = Path(data_dir) / name
    if not path.is_file():
        raise ConfigError(f"evaluation.downstream.data_dir must hold {name!r}: no file {str(path)!r}")
    return path


def load_tasks(manager: TaskManager, tasks: Sequence[str], trust_code: bool) -> TaskDict:
    """The tasks with their data. Raises DataError if a dataset cannot be loaded."""
    with _quiet(), trusted_code_alone(trust_code):
        try:
            return manager.load(list(tasks))
        except OSError as error:
            reason = str(error).splitlines()[0]
            kind = HubTextError if isinstance(error, ConnectionError) else DataError
            raise kind(f"the data of {', '.join(tasks)} cannot be loaded: {reason}") from error


def refuse_other_than_choices(loaded: TaskDict) -> None:
    """Raise ConfigError for a task that needs more of a model than log-likelihoods of answers."""
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in ("loglikelihood", "multiple_choice"):
            raise ConfigError(
                f"evaluation.blockwise must be false with task {name!r}, which asks for {task.OUTPUT_TYPE}: block by "
                "block, only log-likelihoods of answers are computed"
            )


def set_shots(task: Task, num_fewshot: int | None, seed: int) -> None:
    """Set the number of few-shot examples as the library's own entry point does: a task that defines 0 keeps 0."""
    default = task.get_config("num_fewshot")
    if num_fewshot is not None and default != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif default is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed)


def evaluate(
    model: PreTrainedModel | OpenedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: TaskDict,
    *,
    limit: int | None,
    batch_size: int,
    max_length: int,
    scores: Scores,
) -> EvalResults:
    """The library's results of loaded tasks. Its `simple_evaluate` would take seconds to inspect the environment.

    scores: of requests that have been scored elsewhere; takes in those of the others. Where it has a share, nothing but
    that share is scored, and the results mean nothing.
    """
    import lm_eval

    from lqer.evaluation.adapter import adapter_of

    # Otherwise the bootstrap forks this process, with its tokenizer threads and its device, once per core.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with _quiet():
        results = lm_eval.evaluate(
            lm=adapter_of(model, tokenizer, batch_size, max_length, scores),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_RESAMPLES if scores.share is None else 0,
            log_samples=False,
        )
    assert results is not None, "the adapter is of rank 0, for which the library returns results"
    return results


def score_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], seq_len: int, batch_size: int
) -> RollingScore:
    """Score plain documents, in windows of seq_len tokens, as a perplexity task of the library."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    from lqer.evaluation.adapter import adapter_of

    rows = datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": documents}))
    sandbox_templates()
    with _quiet():
        task = ConfigurableTask(
            config={
                "task": "documents",
                "custom_dataset": lambda **metadata: rows,
                "test_split": "test",
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                # A function, because the library applies literal_eval to a template's text that looks like a list.
                "doc_to_target": lambda document: document["text"],
                "metric_list": [{"metric": "word_perplexity"}],
            }
        )
        adapter = adapter_of(model, tokenizer, batch_size, seq_len, Scores())
        set_shots(task, None, seed=0)
        task.build_all_requests()
        log_likelihoods = adapter.loglikelihood_rolling(task.instances)
    scores = [
        task.process_results(request.doc, [log_likelihood])["word_perplexity"]
        for request, log_likelihood in zip(task.instances, log_likelihoods)
    ]
    lengths = [len(adapter.tok_encode(*request.args)) for request in task.instances]
    return RollingScore(
        log_likelihood=sum(log_likelihood for log_likelihood, _ in scores),
        words=sum(words for _, words in scores),
        tokens=sum(lengths),
        windows=sum(math.ceil(length / seq_len) for length in lengths),
    )
