"""Stage "finetune": parts of a quantized checkpoint trained against the original model; codes stay as they are.

lqer/training/parts.py says what can be trained. The loss is the cross-entropy with the original's distribution at every
position but the last ("original"), or with the next token ("text"). Before the first epoch and after each one it is
measured on held-out windows, with the tensors rounded as they would be stored. The artifact is the checkpoint with the
tensors of the best epoch. A killed run resumes after its last whole epoch, from `training-*.safetensors`.

Every block is run once more for its gradient: memory holds the inputs of all blocks and the activations of one.

Shapes: W windows, B windows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again
from tqdm import tqdm
from transformers import PreTrainedModel

from lqer.checkpoint.bits import average_bits
from lqer.checkpoint.load import load_verified
from lqer.checkpoint.pack import DETAILS_FILE, OUTSIDE_FILE, replace_signs, split_columns
from lqer.config.schema import TrainingConfig
from lqer.errors import ModelError
from lqer.models.open import DevicePlacement, load_whole
from lqer.models.source import ModelSource
from lqer.stages.base import Stage, no_effect
from lqer.stages.quantize import Quantize
from lqer.stages.quantize_sequential import QuantizeSequentially
from lqer.store.names import block_file, layers_file
from lqer.store.store import Artifact, Store, Workspace
from lqer.training.loss import soft_loss, text_loss
from lqer.training.optimization import Training
from lqer.training.parts import trained_tensors

TRAINING_FILES = "training-*.safetensors"
HISTORY_FILE = "finetune.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finetune(Stage):
    """The checkpoint with some of its tensors trained."""

    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 2

    source: ModelSource
    checkpoint: Quantize | QuantizeSequentially
    windows_WT: Tensor
    settings: TrainingConfig
    seed: int
    dtype: torch.dtype
    device: torch.device
    device_map: DevicePlacement = field(metadata=no_effect("it decides which GPU holds which block"))

    def build(self, workspace: Workspace, store: Store) -> None:
        checkpoint = self.checkpoint.artifact(store)
        quantized = load_verified(checkpoint, self.device, self.dtype, "emulate", self.device_map)
        original = load_whole(self.source, self.dtype, self.device, self.device_map)
        finetune(workspace, checkpoint, quantized, original, self.windows_WT, self.settings, self.seed)


class Student:
    """A quantized model some of whose tensors are trained. Its module is changed in place."""

    def __init__(
        self, model: PreTrainedModel, details: Mapping[str, Any], stored: Mapping[str, Tensor], settings: TrainingConfig
    ):
        self.model = model.requires_grad_(False)
        self.trained = trained_tensors(model, details["linears"], stored, settings)
        for block in model.get_submodule(details["blocks"]["name"]).children():
            _run_again_for_gradients(block)

    def logits(self, ids_BT: Tensor, as_stored: bool) -> Tensor:
        """(B, T, V), with gradients to the trained parameters unless `as_stored`."""
        for one in self.trained.values():
            one.train(not as_stored)
        return self.model(ids_BT, use_cache=False).logits


@dataclass(frozen=True)
class Objective:
    """The loss of a student: against the text, or against the distributions of the original model."""

    student: Student
    original: PreTrainedModel
    settings: TrainingConfig

    def loss(self, ids_BT: Tensor) -> Tensor:
        """The student's loss on a batch, with gradients to the trained parameters."""
        return self._loss_of(self.student.logits(ids_BT, as_stored=False), ids_BT)

    def validate(self, windows_WT: Tensor) -> float:
        """The mean loss over windows of the student as it would be stored."""
        return self._mean_loss(windows_WT, partial(self.student.logits, as_stored=True))

    def of_original(self, windows_WT: Tensor) -> float:
        """The mean loss over windows of the original model."""
        return self._mean_loss(windows_WT, self._original_logits)

    @torch.no_grad()
    def _mean_loss(self, windows_WT: Tensor, logits_of: Callable[[Tensor], Tensor]) -> float:
        total = 0.0
        for ids_BT in windows_WT.split(self.settings.batch_size):
            ids_BT = ids_BT.to(self.student.model.device)
            total += float(self._loss_of(logits_of(ids_BT), ids_BT)) * len(ids_BT)
        return total / len(windows_WT)

    def _loss_of(self, logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        if self.settings.loss == "text":
            return text_loss(logits_BTV, ids_BT)
        return soft_loss(logits_BTV, self._original_logits(ids_BT))

    @torch.no_grad()
    def _original_logits(self, ids_BT: Tensor) -> Tensor:
        return self.original(ids_BT, use_cache=False).logits


def _run_again_for_gradients(block: nn.Module) -> None:
    """Keep only the block's inputs for the backward pass (gradient checkpointing), in place."""
    block.forward = partial(run_again, block.forward, use_reentrant=False, preserve_rng_state=False)


def finetune(
    workspace: Workspace,
    checkpoint: Artifact,
    quantized: PreTrainedModel,
    original: PreTrainedModel,
    windows_WT: Tensor,
    settings: TrainingConfig,
    seed: int,
) -> None:
    """Train, and write the checkpoint with the best tensors found.

    quantized: of `load_quantized`, emulated; it is changed. original: the model it was made from, on the same device.
    windows_WT: token ids, the last `settings.validation_samples` windows held out.
    """
    if DETAILS_FILE in workspace:  # written last: an earlier process was killed after it
        _remove_training(workspace)
        return
    details = checkpoint.json(DETAILS_FILE)
    student = Student(quantized, details, _all_tensors(checkpoint, details), settings)
    if not student.trained:
        raise ModelError(f"finetune.parts {list(settings.parts)}: no linear that is quantized has such a part")
    train_WT, held_out_WT = windows_WT.split([settings.num_samples, settings.validation_samples])
    steps_per_epoch = -(-settings.num_samples // settings.batch_size)
    training = Training(student.trained, settings, steps_per_epoch)
    objective = Objective(student, original, settings)
    saved = [name for name in workspace.names() if fnmatchcase(name, TRAINING_FILES)]
    if saved:
        training.restore(workspace.tensors(saved[-1]))
    else:
        training.record(objective.validate(held_out_WT))
    log.info("finetune: %d tensors, validation loss %.5f before", len(student.trained), training.losses[0])
    for epoch in range(len(training.losses), settings.epochs + 1):
        order_W = torch.randperm(len(train_WT), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        batches = train_WT[order_W].split(settings.batch_size)
        for step, ids_BT in enumerate(tqdm(batches, desc="finetune", unit="step"), (epoch - 1) * steps_per_epoch):
            training.step(objective.loss(ids_BT.to(quantized.device)), step)
        training.record(objective.validate(held_out_WT))
        log.info("finetune: epoch %d of %d, validation loss %.5f", epoch, settings.epochs, training.losses[-1])
        # Under a name of its own, then without the older one: after a kill one of them is whole.
        workspace.write_tensors(f"training-{epoch:05d}.safetensors", training.tensors())
        _remove_training(workspace, keep=epoch)
    history = {
        "validation_loss": training.losses,
        "original_loss": objective.of_original(held_out_WT),
        "best_epoch": training.best_epoch,
    }
    best = {name: one.stored(training.best[name]).cpu() for name, one in student.trained.items()}
    _write(workspace, checkpoint, details, best, history)


def _all_tensors(checkpoint: Artifact, details: Mapping[str, Any]) -> dict[str, Tensor]:
    files = [*map(block_file, range(details["blocks"]["count"])), OUTSIDE_FILE]
    return {name: tensor for file in files for name, tensor in checkpoint.tensors(file).items()}


def _write(
    workspace: Workspace,
    checkpoint: Artifact,
    details: dict[str, Any],
    best: Mapping[str, Tensor],
    history: Mapping[str, Any],
) -> None:
    """Write the checkpoint with the best tensors, by their names in `trained_tensors`, their bits, and the history."""
    rows: list[dict[str, Any]] = []
    for index in range(details["blocks"]["count"]):
        tensors, block_rows = checkpoint.tensors(block_file(index)), checkpoint.json(layers_file(index))
        tensors |= {name: best[name] for name in best.keys() & tensors.keys()}
        for row in block_rows:
            signs, factors = (
                {role: best[f"{row['name']}.{role}"] for role in roles if f"{row['name']}.{role}" in best}
                for roles in (("input_signs", "output_signs"), ("low_rank_a", "low_rank_b"))
            )
            if signs:
                added = replace_signs(tensors, row["name"], signs)
                row["metadata_bits"] += added
                row["sign_bits"] += added
            if factors:
                row["low_rank_bits"] += split_columns(tensors, row["name"], row["entry"], factors)
        rows += block_rows
        workspace.write_json(layers_file(index), block_rows)
        workspace.write_tensors(block_file(index), tensors)
    outside = checkpoint.tensors(OUTSIDE_FILE)
    if changed_outside := {name: best[name] for name in best.keys() & outside.keys()}:
        workspace.write_tensors(OUTSIDE_FILE, outside | changed_outside)
    for file in checkpoint.manifest["files"]:
        if file not in workspace and file != DETAILS_FILE:
            workspace.write(file, partial(shutil.copyfile, checkpoint.file(file)))
    changed = {"linears": {row["name"]: row["entry"] for row in rows}, "bits": average_bits(rows)}
    workspace.write_json(HISTORY_FILE, history)
    workspace.write_json(DETAILS_FILE, {**details, **changed})
    _remove_training(workspace)


def _remove_training(workspace: Workspace, keep: int | None = None) -> None:
    """Remove the saved states but that of one epoch: an optimizer's state is larger than the checkpoint."""
    for name in workspace.names():
        if fnmatchcase(name, TRAINING_FILES) and name != f"training-{keep or 0:05d}.safetensors":
            workspace.remove(name)
