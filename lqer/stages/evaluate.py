"""Stage "evaluate": every candidate model on every text and task, each result an artifact of its own.

A result is named by what the model was made from, the tokens or task files it was measured on, and the protocol. So the
original model is evaluated once, however many schemes are compared with it. A model is loaded once, when the first of
its results is missing, and released before the next model is loaded.

Losses of windows and scores of requests can be made in parts, by several processes. A part is a file of the unfinished
artifact; the result is made of all of them in their order, so that it is the number of one process, and they are gone.

Shapes: W windows, B windows of a batch, T tokens of a window.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lqer.config.evaluation import DownstreamConfig
from lqer.errors import ModelError
from lqer.evaluation.decode_speed import seconds_per_token
from lqer.evaluation.downstream import TaskFiles, TaskResult, TaskSettings, evaluate_tasks
from lqer.evaluation.perplexity import WINDOWED_PROTOCOLS, PerplexityResult, batch_nlls, lm_eval_perplexity, window_nlls
from lqer.evaluation.requests import Scores, Share
from lqer.phases import in_phase
from lqer.stages.base import Stage, identity, no_effect
from lqer.store.names import LOSSES, SCORES, losses_file, scores_file
from lqer.store.store import Artifact, Store, Workspace

log = logging.getLogger(__name__)

RESULT_FILE = "result.json"


def shown_perplexity(artifact: Artifact) -> str:
    """The perplexity as the log shows it."""
    value = artifact.json(RESULT_FILE)["perplexity"]
    return "perplexity not finite" if value is None else f"perplexity {value:.4f}"


class Candidate:
    """A model to be evaluated.

    role: "quantized", "rtn" or "original". made_from: what decides its outputs, as `identity` accepts it. load: reads
    it from the store, whole or to be run block by block. losses: of windows, found by a pass over them for something
    else; by the identity of their perplexity and the number of the batch.
    """

    def __init__(self, role: str, made_from: Mapping[str, Any], load: Callable[[Store], Any]):
        self.role = role
        self.identity = identity(made_from)
        self.losses: dict[str, dict[int, Tensor]] = {}
        self._load = load
        self._model: Any = None

    @in_phase("load")
    def model(self, store: Store) -> Any:
        """A PreTrainedModel, or an OpenedModel under evaluation.blockwise."""
        self._model = self._model or self._load(store)
        return self._model

    def release(self) -> None:
        """Free the model's memory."""
        self._model = None
        self.losses.clear()


@dataclass(frozen=True)
class Evaluation(Stage):
    """One measurement of one candidate; `result` reads it back."""

    candidate: Candidate
    title: str = field(metadata=no_effect("it names the text or the tasks in the log"))

    @property
    def log_name(self) -> str:
        return f"evaluate {self.candidate.role} on {self.title}"

    def result(self, store: Store) -> Any:
        return self.artifact(store).json(RESULT_FILE)

    def write(self, workspace: Workspace, result: PerplexityResult) -> None:
        """Write a perplexity, null where it is not finite. Raises ModelError where that is the original model's."""
        if not math.isfinite(result.perplexity) and self.candidate.role == "original":
            raise ModelError(
                f"the original model's loss on {self.title} is not finite: its weights, or its dtype, cannot be used"
            )
        workspace.write_json(RESULT_FILE, asdict(result))


@dataclass(frozen=True)
class Divisible(Evaluation):
    """One that several processes can make together; `build` makes what is missing, and the result of all parts."""

    @property
    @abstractmethod
    def most_parts(self) -> int:
        """The most parts it can be made in."""

    @abstractmethod
    def part_file(self, index: int, count: int) -> str:
        """The name of the file of part `index` of `count`, counted from 0."""

    @abstractmethod
    def measure(self, store: Store, index: int, count: int) -> dict[str, Tensor]:
        """What the file of a part holds."""

    def contribute(self, store: Store, index: int, count: int) -> Artifact | None:
        """Make a part, alongside other processes. Returns the result if no other part is missing, else None."""

        def write_part(workspace: Workspace) -> None:
            if (file := self.part_file(index, count)) not in workspace:
                workspace.write_tensors(file, self.measure(store, index, count))

        return store.contribute(
            self.name,
            self.key,
            write_part,
            is_whole=lambda workspace: all(self.part_file(part, count) in workspace for part in range(count)),
            finish=lambda workspace: self.build(workspace, store),
        )


def _parts(workspace: Workspace, beginning: str) -> dict[str, Tensor]:
    """The tensors of all parts, whatever their number was."""
    files = [name for name in workspace.names() if name.startswith(f"{beginning}-")]
    return {name: tensor for file in files for name, tensor in workspace.tensors(file).items()}


def _remove_parts(workspace: Workspace, beginning: str) -> None:
    for name in workspace.names():
        if name.startswith(f"{beginning}-"):
            workspace.remove(name)


@dataclass(frozen=True)
class WindowPerplexity(Divisible):
    """Perplexity over windows of tokens (W, T), int64."""

    name: ClassVar[str] = "perplexity"
    version: ClassVar[int] = 2

    protocol: str
    windows_WT: Tensor
    batch_size: int

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """Windows (B, T) that are run together."""
        return self.windows_WT.split(self.batch_size)

    @property
    def most_parts(self) -> int:
        return math.ceil(len(self.windows_WT) / self.batch_size)

    def part_file(self, index: int, count: int) -> str:
        batches = self._batches_of(index, count)
        return losses_file(batches[0], batches[-1])

    def measure(self, store: Store, index: int, count: int) -> dict[str, Tensor]:
        return self._losses(store, self._batches_of(index, count))

    def windows_of(self, index: int, count: int) -> int:
        """How many windows a part has."""
        all_batches = self.batches
        return sum(len(all_batches[batch]) for batch in self._batches_of(index, count))

    def build(self, workspace: Workspace, store: Store) -> None:
        found = _parts(workspace, LOSSES)
        indices = range(self.most_parts)
        found |= self._losses(store, [index for index in indices if str(index) not in found])
        nlls = [found[str(index)] for index in indices]
        self.write(workspace, WINDOWED_PROTOCOLS[self.protocol].result(nlls, self.windows_WT))
        _remove_parts(workspace, LOSSES)

    def find_losses(self, batch: int, logits_BTV: Tensor) -> None:
        """Keep the losses of a batch until `build`, from logits that another stage has come by."""
        nll_B = batch_nlls(logits_BTV, self.batches[batch])
        self.candidate.losses.setdefault(self.identity, {})[batch] = nll_B

    def _batches_of(self, index: int, count: int) -> Sequence[int]:
        batches = self.most_parts
        return range(index * batches // count, (index + 1) * batches // count)

    def _losses(self, store: Store, batches: Sequence[int]) -> dict[str, Tensor]:
        """The losses (B,) of these batches, by their number."""
        all_batches, known = self.batches, self.candidate.losses.get(self.identity, {})
        found = {str(index): known[index].cpu() for index in batches if index in known}
        if missing := [index for index in batches if index not in known]:
            nlls = window_nlls(self.candidate.model(store), [all_batches[index] for index in missing])
            found |= {str(index): nll_B for index, nll_B in zip(missing, nlls)}
        return found

    def summary(self, artifact: Artifact) -> str:
        return shown_perplexity(artifact)


@dataclass(frozen=True)
class DocumentPerplexity(Evaluation):
    """Word perplexity of whole documents, by lm-evaluation-harness."""

    name: ClassVar[str] = "perplexity"
    version: ClassVar[int] = 2

    documents: tuple[str, ...]
    seq_len: int
    batch_size: int
    tokenizer: PreTrainedTokenizerBase = field(
        metadata=no_effect("it is a part of the model, and its fingerprint covers it")
    )

    def build(self, workspace: Workspace, store: Store) -> None:
        model, documents = self.candidate.model(store), list(self.documents)
        result = lm_eval_perplexity(model, self.tokenizer, documents, self.seq_len, self.batch_size)
        self.write(workspace, result)

    def summary(self, artifact: Artifact) -> str:
        return f"word {shown_perplexity(artifact)}"


@dataclass(frozen=True)
class DecodeSpeed(Evaluation):
    """Tokens a second at batch 1; null where a CUDA graph cannot hold the model. hardware: the GPU by name."""

    name: ClassVar[str] = "decode"
    version: ClassVar[int] = 1

    hardware: str

    def build(self, workspace: Workspace, store: Store) -> None:
        try:
            speed = 1 / seconds_per_token(self.candidate.model(store))
        except RuntimeError as error:
            log.warning("the %s model has no decode speed: %s", self.candidate.role, str(error).partition("\n")[0])
            speed = None
        workspace.write_json(RESULT_FILE, {"tokens_per_second": speed})

    def summary(self, artifact: Artifact) -> str:
        speed = artifact.json(RESULT_FILE)["tokens_per_second"]
        return "no decode speed" if speed is None else f"{speed:.1f} tokens a second"


@dataclass(frozen=True)
class TaskAccuracy(Divisible):
    """Tasks of lm-evaluation-harness. tasks: `task_fingerprint` of the files that define them."""

    name: ClassVar[str] = "downstream"
    version: ClassVar[int] = 2

    # Each part makes the requests of all tasks anew.
    most_parts: ClassVar[int] = 8

    tasks: str
    num_fewshot: int | None
    limit: int | None
    batch_size: int
    max_length: int
    seed: int
    settings: DownstreamConfig = field(metadata=no_effect("the other fields hold what matters of it"))
    tokenizer: PreTrainedTokenizerBase = field(
        metadata=no_effect("it is a part of the model, and its fingerprint covers it")
    )

    def part_file(self, index: int, count: int) -> str:
        return scores_file(index, count)

    def measure(self, store: Store, index: int, count: int) -> dict[str, Tensor]:
        scores = Scores(Share(index, count))
        self._evaluated(store, scores)
        return scores.tensors()

    def build(self, workspace: Workspace, store: Store) -> None:
        results = self._evaluated(store, Scores.of(_parts(workspace, SCORES)))
        workspace.write_json(RESULT_FILE, [asdict(result) for result in results])
        _remove_parts(workspace, SCORES)

    def _evaluated(self, store: Store, scores: Scores) -> list[TaskResult]:
        settings = TaskSettings(self.num_fewshot, self.limit, self.batch_size, self.max_length, self.seed)
        return evaluate_tasks(self.candidate.model(store), self.tokenizer, task_files(self.settings), settings, scores)


def task_files(settings: DownstreamConfig) -> TaskFiles:
    """The tasks that a configuration names."""
    return TaskFiles(settings.tasks, settings.task_folder, settings.data_folder, settings.trust_code)
