"""Stage "finetune": parts of a quantized checkpoint trained against the original model; codes stay as they are.

    rht_signs    the signs of every linear's rotation become real vectors (QuIP#, arXiv 2402.04396; CALDERA, 2405.18886)
    low_rank     the first columns of A and rows of B, in bfloat16; the rest stays quantized (CALDERA)

The loss is the cross-entropy with the original's distribution at every position but the last ("original"), or with the
next token ("text"). Before the first epoch and after each one it is measured on held-out windows, with the tensors
rounded as they would be stored. The artifact is the checkpoint with the tensors of the best epoch. A killed run resumes
after its last whole epoch, from `training-*.safetensors`.

Shapes: W windows, B windows of a batch, T tokens, V vocabulary, I in_features, O out_features, R rank, E epochs.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import PreTrainedModel

from lqer.checkpoint.bits import average_bits
from lqer.checkpoint.load import load_quantized
from lqer.checkpoint.pack import DETAILS_FILE, replace_signs, split_columns
from lqer.config.schema import TrainingConfig
from lqer.errors import ModelError
from lqer.models.open import DevicePlacement, load_whole
from lqer.models.source import ModelSource
from lqer.nn.linear import HadamardLinear
from lqer.stages.base import Stage, no_effect
from lqer.stages.quantize import Quantize
from lqer.stages.quantize_sequential import QuantizeSequentially
from lqer.store.names import block_file, layers_file
from lqer.store.store import Artifact, Store, Workspace

TRAINING_FILES = "training-*.safetensors"
HISTORY_FILE = "finetune.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A trained tensor: its float32 parameter and the dtype it is stored in.

    buffer: the module tensor that it replaces. rest: the part of that tensor, along `axis`, that is not trained.
    """

    buffer: str
    parameter: nn.Parameter
    storage: torch.dtype
    rest: Tensor | None = None
    axis: int = 0

    def value(self, dtype: torch.dtype, as_stored: bool) -> Tensor:
        """The module's tensor."""
        value = self.parameter.to(self.storage) if as_stored else self.parameter
        value = value.to(dtype)
        return value if self.rest is None else torch.cat([value, self.rest], dim=self.axis)


def trained_tensors(model: PreTrainedModel, linears: Sequence[str], settings: TrainingConfig) -> dict[str, Trained]:
    """The tensors of `settings.parts`, by "<linear>.<role>"; A and B below `columns` columns are trained whole."""
    found: dict[str, Trained] = {}
    for name in linears:
        module = model.get_submodule(name)
        inner, prefix = (module.inner, f"{name}.inner") if isinstance(module, HadamardLinear) else (module, name)
        if "rht_signs" in settings.parts and isinstance(module, HadamardLinear):
            for role in ("input_signs", "output_signs"):
                signs = getattr(module, role)
                found[f"{name}.{role}"] = Trained(f"{name}.{role}", _parameter(signs), torch.float16)
        if "low_rank" in settings.parts and inner.low_rank_a is not None:
            for role, axis in (("low_rank_a", 1), ("low_rank_b", 0)):
                whole: Tensor = getattr(inner, role)
                columns = min(settings.columns, whole.shape[axis])
                first, rest = whole.split([columns, whole.shape[axis] - columns], dim=axis)
                found[f"{name}.{role}"] = Trained(f"{prefix}.{role}", _parameter(first), torch.bfloat16, rest, axis)
    return found


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(torch.float32).clone())


class Student:
    """A quantized model some of whose tensors are trained."""

    def __init__(self, model: PreTrainedModel, trained: Mapping[str, Trained]):
        self.model, self.trained = model.requires_grad_(False), trained

    def logits(self, ids_BT: Tensor, as_stored: bool = False) -> Tensor:
        """(B, T, V), with gradients to the trained parameters unless `as_stored`."""
        tensors = {part.buffer: part.value(self.model.dtype, as_stored) for part in self.trained.values()}
        return functional_call(self.model, tensors, (ids_BT,), {"use_cache": False}).logits


def soft_loss(logits_BTV: Tensor, original_BTV: Tensor) -> Tensor:
    """Cross-entropy with the original's distribution, mean over all positions but the last."""
    target_BTV = original_BTV[:, :-1].float().softmax(-1)
    return -(target_BTV * logits_BTV[:, :-1].float().log_softmax(-1)).sum(-1).mean()


def text_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Cross-entropy with the next token."""
    return F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten())


class Training:
    """Parameters, optimizer and history: the state at the start of an epoch, saved in `training-*.safetensors`."""

    def __init__(self, trained: Mapping[str, Trained], settings: TrainingConfig, steps_per_epoch: int):
        self.parameters = {name: part.parameter for name, part in trained.items()}
        rates = {"signs": settings.learning_rate, "low_rank": settings.low_rank_learning_rate}
        groups = [
            {"params": [p for name, p in self.parameters.items() if (name.endswith("signs")) == (kind == "signs")],
             "lr": rate}
            for kind, rate in rates.items()
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=settings.weight_decay)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = steps_per_epoch * settings.epochs
        self.warmup_steps = int(settings.warmup * self.steps)
        self.best = self._copy()
        self.losses: list[float] = []

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @property
    def best_epoch(self) -> int:
        return min(range(len(self.losses)), key=lambda epoch: self.losses[epoch])

    def record(self, loss: float) -> None:
        """Append a validation loss, and copy the parameters if it is the lowest so far."""
        self.losses.append(loss)
        if self.best_epoch == len(self.losses) - 1:
            self.best = self._copy()

    def step(self, loss: Tensor, step: int) -> None:
        """One optimizer step; the learning rate rises linearly over the warm-up, then falls linearly to 0."""
        rising, falling = (step + 1) / (self.warmup_steps + 1), (self.steps - step) / (self.steps - self.warmup_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * min(rising, falling)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        kept = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            kept |= {f"now.{name}": parameter, f"best.{name}": self.best[name]}
            kept |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return kept

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        self.losses = kept["losses"].tolist()
        for name, parameter in self.parameters.items():
            parameter.data.copy_(kept[f"now.{name}"])
            self.best[name] = kept[f"best.{name}"].to(parameter.device)
            if f"step.{name}" in kept:
                state = {key: kept[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    "step": kept[f"step.{name}"], **{key: value.to(parameter.device) for key, value in state.items()}
                }  # fmt: skip


@dataclass(frozen=True)
class Finetune(Stage):
    """The checkpoint with some of its tensors trained."""

    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 1

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
        checkpoint.verify()
        student = load_quantized(checkpoint.path, self.device, self.dtype, "emulate", self.device_map, verify=False)
        original = load_whole(self.source, self.dtype, self.device, self.device_map)
        finetune(workspace, checkpoint, student, original, self.windows_WT, self.settings, self.seed)


def finetune(
    workspace: Workspace,
    checkpoint: Artifact,
    student: PreTrainedModel,
    original: PreTrainedModel,
    windows_WT: Tensor,
    settings: TrainingConfig,
    seed: int,
) -> None:
    """Train, and write the checkpoint with the best tensors found.

    student: of `load_quantized`, emulated; original: the model it was made from, on the same device. windows_WT: token
    ids, the last `settings.validation_samples` windows held out.
    """
    if DETAILS_FILE in workspace:  # written last: an earlier process was killed after it
        _remove_training(workspace)
        return
    details = checkpoint.json(DETAILS_FILE)
    trained = trained_tensors(student, list(details["linears"]), settings)
    if not trained:
        raise ModelError(f"finetune.parts {list(settings.parts)}: no linear that is quantized has such a part")
    pupil = Student(student, trained)
    train_WT, held_out_WT = windows_WT.split([settings.num_samples, settings.validation_samples])
    steps_per_epoch = -(-settings.num_samples // settings.batch_size)
    training = Training(trained, settings, steps_per_epoch)

    def loss_of(ids_BT: Tensor, as_stored: bool) -> Tensor:
        ids_BT = ids_BT.to(student.device)
        logits_BTV = pupil.logits(ids_BT, as_stored)
        if settings.loss == "text":
            return text_loss(logits_BTV, ids_BT)
        with torch.no_grad():
            original_BTV = original(ids_BT, use_cache=False).logits
        return soft_loss(logits_BTV, original_BTV)

    @torch.no_grad()
    def validate() -> float:
        losses = [float(loss_of(ids_BT, True)) * len(ids_BT) for ids_BT in held_out_WT.split(settings.batch_size)]
        return sum(losses) / len(held_out_WT)

    saved = [name for name in workspace.names() if fnmatchcase(name, TRAINING_FILES)]
    if saved:
        training.restore(workspace.tensors(saved[-1]))
    else:
        training.record(validate())
    log.info("finetune: %d tensors, validation loss %.5f before", len(trained), training.losses[0])
    for epoch in range(len(training.losses), settings.epochs + 1):
        order_W = torch.randperm(len(train_WT), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        batches = train_WT[order_W].split(settings.batch_size)
        for step, ids_BT in enumerate(tqdm(batches, desc="finetune", unit="step"), (epoch - 1) * steps_per_epoch):
            training.step(loss_of(ids_BT, False), step)
        training.record(validate())
        log.info("finetune: epoch %d of %d, validation loss %.5f", epoch, settings.epochs, training.losses[-1])
        # Under a name of its own, then without the older one: after a kill one of them is whole.
        workspace.write_tensors(f"training-{epoch:05d}.safetensors", training.tensors())
        _remove_training(workspace, keep=epoch)
    _write(workspace, checkpoint, details, trained, training)


def _write(
    workspace: Workspace,
    checkpoint: Artifact,
    details: dict[str, Any],
    trained: Mapping[str, Trained],
    training: Training,
) -> None:
    """Write the checkpoint with the tensors of the best epoch, their bits, and the history."""
    best = {name: value.to(trained[name].storage).cpu() for name, value in training.best.items()}
    rows: list[dict[str, Any]] = []
    for index in range(details["blocks"]["count"]):
        tensors, block_rows = checkpoint.tensors(block_file(index)), checkpoint.json(layers_file(index))
        for row in block_rows:
            signs, factors = (
                {role: best[f"{row['name']}.{role}"] for role in roles if f"{row['name']}.{role}" in best}
                for roles in (("input_signs", "output_signs"), ("low_rank_a", "low_rank_b"))
            )
            if signs:
                row["metadata_bits"] += replace_signs(tensors, row["name"], signs)
            if factors:
                row["low_rank_bits"] += split_columns(tensors, row["name"], row["entry"], factors)
        rows += block_rows
        workspace.write_json(layers_file(index), block_rows)
        workspace.write_tensors(block_file(index), tensors)
    for file in checkpoint.manifest["files"]:
        if file not in workspace and file != DETAILS_FILE:
            workspace.write(file, partial(shutil.copyfile, checkpoint.file(file)))
    changed = {"linears": {row["name"]: row["entry"] for row in rows}, "bits": average_bits(rows)}
    workspace.write_json(HISTORY_FILE, {"validation_loss": training.losses, "best_epoch": training.best_epoch})
    workspace.write_json(DETAILS_FILE, {**details, **changed})
    _remove_training(workspace)


def _remove_training(workspace: Workspace, keep: int | None = None) -> None:
    """Remove the saved states but that of one epoch: an optimizer's state is larger than the checkpoint."""
    for name in workspace.names():
        if fnmatchcase(name, TRAINING_FILES) and name != f"training-{keep or 0:05d}.safetensors":
            workspace.remove(name)
