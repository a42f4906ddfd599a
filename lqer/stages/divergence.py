"""Stages of divergence: the original's next-token distributions, stored once, and every candidate's distance from them.

Both run a model over the windows of its perplexity, which is therefore measured after them, of the losses that they
find.

The distributions are one file per batch of windows, so that a killed run resumes at the next batch. They are named by
the original model, the tokens and K, so any number of candidates reads the same ones.

Shapes: W windows, B windows of a batch, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from torch import Tensor

from lqer.errors import ModelError
from lqer.evaluation.divergence import Distribution, divergence, original_distributions
from lqer.stages.base import Stage, no_effect
from lqer.stages.evaluate import RESULT_FILE, Candidate, Evaluation, WindowPerplexity
from lqer.store.names import distribution_file
from lqer.store.store import Artifact, Store, Workspace


@dataclass(frozen=True)
class OriginalDistributions(Stage):
    """The original's K most likely tokens after every token of the windows (W, T), int64."""

    name: ClassVar[str] = "distribution"
    version: ClassVar[int] = 1

    original: Candidate
    windows_WT: Tensor
    batch_size: int
    top_k: int
    perplexity: WindowPerplexity = field(metadata=no_effect("its losses are found in the same pass"))
    title: str = field(metadata=no_effect("it names the text in the log"))

    @property
    def log_name(self) -> str:
        return f"distributions of the original on {self.title}"

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The windows (B, T) of each file."""
        return self.windows_WT.split(self.batch_size)

    def build(self, workspace: Workspace, store: Store) -> None:
        missing = [index for index in range(len(self.batches)) if distribution_file(index) not in workspace]
        if not missing:
            return
        model, windows = self.original.model(store), [self.batches[index] for index in missing]

        def seen(batch: int, logits_BTV: Tensor) -> None:
            self.perplexity.find_losses(missing[batch], logits_BTV)

        for index, found in zip(missing, original_distributions(model, windows, self.top_k, seen)):
            if not found.total_N.isfinite().all():
                raise ModelError(
                    f"the original model's logits on {self.title} are not finite: its weights, or its dtype, cannot be "
                    "used"
                )
            workspace.write_tensors(distribution_file(index), found._asdict())

    def read(self, store: Store) -> Iterator[Distribution]:
        """The distributions of each batch."""
        artifact = self.artifact(store)
        return (Distribution(**artifact.tensors(distribution_file(index))) for index in range(len(self.batches)))

    def summary(self, artifact: Artifact) -> str:
        return f"the {self.top_k} most likely tokens after {self.windows_WT[:, 1:].numel()}"


@dataclass(frozen=True)
class WindowDivergence(Evaluation):
    """A candidate's divergence from the original on the windows of a perplexity."""

    name: ClassVar[str] = "divergence"
    version: ClassVar[int] = 1

    originals: OriginalDistributions
    protocol: str
    perplexity: WindowPerplexity = field(metadata=no_effect("its losses are found in the same pass"))

    def build(self, workspace: Workspace, store: Store) -> None:
        model, seen = self.candidate.model(store), self.perplexity.find_losses
        result = divergence(model, self.originals.read(store), self.originals.batches, self.protocol, seen)
        workspace.write_json(RESULT_FILE, asdict(result))

    def summary(self, artifact: Artifact) -> str:
        found = artifact.json(RESULT_FILE)
        if found["kl_mean"] is None:
            return "divergence not finite"
        return f"KL from the original {found['kl_mean']:.5f}, top-1 agreement {found['top1_agreement']:.2%}"
