"""Zero- and few-shot tasks of lm-evaluation-harness: its own collection, and local YAMLs on JSON-lines files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from lqer.errors import ConfigError
from lqer.evaluation import harness
from lqer.evaluation.requests import Scores

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lqer.models.loaders import OpenedModel

# Keys of a task's YAML that state where few-shot examples come from.
EXAMPLES_FROM = {"training_split", "fewshot_split", "fewshot_config"}


@dataclass(frozen=True)
class TaskResult:
    task: str  # a task, or a group that aggregates its tasks
    metric: str  # "acc", "acc_norm", "perplexity", ...; "exact_match,strict-match" if a task filters answers
    value: float
    stderr: float | None
    num_fewshot: int | None  # None for a group whose tasks differ
    samples: int


@dataclass(frozen=True)
class TaskFiles:
    """Tasks by name, and where their files are.

    include_path    a folder of local task YAMLs; they replace the library's tasks of the same name
    data_dir        the folder to which paths in local YAMLs are relative
    trust_code      whether local tasks may run Python code of their folder
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    data_dir: Path | None = None
    trust_code: bool = False

    @property
    def manager(self) -> TaskManager:
        return harness.task_manager(self.names, self.include_path, self.data_dir)

    def load(self) -> TaskDict:
        return harness.load_tasks(self.manager, self.names, self.trust_code)


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are scored.

    num_fewshot     examples in the prompt; None: the number that each task defines
    limit           only the first rows of each task
    max_length      tokens of a prompt with its answer; longer ones are truncated at the start
    seed            of the few-shot examples and of all sampling in tasks; sets the global generators
    """

    num_fewshot: int | None
    limit: int | None
    batch_size: int
    max_length: int
    seed: int


def check_tasks(tasks: TaskFiles, num_fewshot: int | None = None) -> None:
    """Raise ConfigError for mistakes in the tasks that can be found without a model or the network.

    These are: an unknown name; a task requested twice; a local task whose file under `data_dir` is missing; few-shot
    examples for a local task without a training split, which would be taken from the evaluated rows.
    """
    manager = tasks.manager
    asked_as: dict[str, str] = {}
    for name in tasks.names:
        for task, entry in harness.entries(manager, name).items():
            if task in asked_as:
                raise ConfigError(f"evaluation.downstream.tasks: {task!r} is in both {asked_as[task]!r} and {name!r}")
            asked_as[task] = name
            files = harness.data_files(entry)
            for file in files:
                harness.jsonl_path(file, tasks.data_dir)
            if files and num_fewshot and EXAMPLES_FROM.isdisjoint(entry.cfg or {}):
                raise ConfigError(
                    f"evaluation.downstream.num_fewshot must be 0 for {task!r}, whose YAML names no training_split: "
                    f"found {num_fewshot}"
                )


def check_task_data(tasks: TaskFiles, blockwise: bool = False) -> None:
    """Load the data of the tasks. Raises DataError where they cannot be read, HubTextError where no hub answers.

    blockwise: whether the model is to be run block by block. Raises ConfigError for a task that cannot be so.
    """
    loaded = tasks.load()
    if blockwise:
        harness.refuse_other_than_choices(loaded)


def evaluate_tasks(
    model: PreTrainedModel | OpenedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskFiles,
    settings: TaskSettings,
    scores: Scores | None = None,
) -> list[TaskResult]:
    """Every numeric metric of every task; of a group, those of its tasks and its aggregates.

    scores: of requests that are scored already, and which to score: see `harness.evaluate`.

    Raises ConfigError as `check_tasks` does, and DataError if a dataset cannot be loaded.
    """
    check_tasks(tasks, settings.num_fewshot)
    # Here, so that only tasks load it: it stands among the tools of transformers' trainer, which import peft.
    from transformers import set_seed

    set_seed(settings.seed)
    loaded = tasks.load()
    for task in loaded["tasks"].values():
        harness.set_shots(task, settings.num_fewshot, settings.seed)
    results = harness.evaluate(
        model,
        tokenizer,
        loaded,
        limit=settings.limit,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        scores=scores or Scores(),
    )
    return [
        TaskResult(
            task=task,
            metric=metric if answer_filter == "none" else key,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, Real) else None,
            num_fewshot=results["n-shot"].get(task),
            samples=metrics["sample_len"],
        )
        for task, metrics in results["results"].items()
        for key, value in metrics.items()
        for metric, _, answer_filter in [key.partition(",")]
        for stderr in [metrics.get(f"{metric}_stderr,{answer_filter}")]
        if answer_filter and not metric.endswith("_stderr") and isinstance(value, Real)
    ]


def task_fingerprint(tasks: TaskFiles) -> str:
    """sha256 (hex) of everything that determines the scores, except the model and the other arguments of
    `evaluate_tasks`.

    Covers the names of the tasks, lm_eval's version, and for every local task its YAML with its includes, the Python
    files in the same folder and its data files. Data on the Hub is not covered. Raises as `check_tasks` does.
    """
    check_tasks(tasks)
    manager = tasks.manager
    digest = hashlib.sha256(json.dumps([version("lm_eval"), *tasks.names]).encode())
    own = None if tasks.include_path is None else tasks.include_path.resolve()
    for name in tasks.names:
        for task, entry in harness.entries(manager, name).items():
            if own is None or entry.yaml_path is None or own not in entry.yaml_path.parents:
                continue
            folder = entry.yaml_path.parent
            # The index prefixes a function with its folder, whose location must not matter.
            digest.update(json.dumps([task, entry.cfg], sort_keys=True, default=str).replace(str(folder), "").encode())
            files = [harness.jsonl_path(file, tasks.data_dir) for file in harness.data_files(entry)]
            for path in [*sorted(folder.glob("*.py")), *files]:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
