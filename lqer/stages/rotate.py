"""Stage "rotate": the model with rotated hidden states, which have no outliers (QuaRot), as a folder of weights.

It computes the same function as the original, and later stages read it instead. The folder is an ordinary transformers
checkpoint: matrices of the decoder blocks in float32, so that they are rounded only when they are quantized, and
everything else in the original's dtype. Its config.json names the linears whose inputs are rotated at run time, if any
(`online_rotations`, see `prepare_model`). The whole model is in memory, in float32, while it is rotated.

Shapes: D hidden size, B sequences, T tokens.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.components import ADDED
from lqer.errors import ModelError
from lqer.models.open import load_whole
from lqer.models.source import ModelSource, stored_dtype
from lqer.models.structure import ONLINE_ROTATIONS, find_blocks
from lqer.stages.base import Stage, no_effect
from lqer.store.store import Artifact, Store, Workspace
from lqer.transforms.hadamard import hadamard, random_hadamard
from lqer.transforms.quarot import Quarot, RotationError, rotate_model

# With rotations at run time.
BOTH = Quarot()
# Shape (B, T) of the random token ids on which the logits are compared before and after.
PROBE_SHAPE = (2, 32)
# The largest size of a file, so that a block is read without reading all others.
SHARD_SIZE = "2GB"
# The fraction of a GPU's free memory that the parameters may take.
MAX_GPU_FRACTION = 0.7


@dataclass(frozen=True)
class Rotate(Stage):
    """The rotated model, an ordinary folder of weights."""

    name: ClassVar[str] = "rotate"
    version: ClassVar[int] = 2

    source: ModelSource
    seed: int
    device: torch.device = field(metadata=no_effect("matrices are rotated in float64 and rounded to float32"))
    transform: Quarot = field(default=BOTH, metadata=ADDED)

    def build(self, workspace: Workspace, store: Store) -> None:
        rotate(workspace, self.source, self.device, self.seed, self.transform.online)

    def rotated(self, store: Store) -> ModelSource:
        """Where later stages read the rotated model."""
        return rotated_source(self.source, self.artifact(store))


def source_of(model: ModelSource | Rotate, store: Store) -> ModelSource:
    """Where the model that a stage works on is read from."""
    return model.rotated(store) if isinstance(model, Rotate) else model


def rotate(workspace: Workspace, source: ModelSource, device: torch.device, seed: int, online: bool = True) -> None:
    """Write the rotated model; online: see `Quarot`. Raises ModelError for a model that cannot be rotated."""
    model = load_whole(source, torch.float32, torch.device("cpu"))
    if _fits(model, device):
        nn.Module.to(model, device)
    rotate_in_place(model, device, seed, online)
    nn.Module.to(model, torch.device("cpu"))
    blocks_name, _ = find_blocks(model)
    model.config.dtype = stored_dtype(source)
    for name, parameter in model.named_parameters():
        if not (name.startswith(f"{blocks_name}.") and parameter.ndim == 2):
            parameter.data = parameter.data.to(model.config.dtype)
    with tempfile.TemporaryDirectory(dir=workspace.path) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        for file in sorted(Path(folder).iterdir()):
            workspace.write(file.name, partial(shutil.move, file))


def _fits(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the whole model, one matrix in float64 and intermediate results fit on the GPU."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return sum(parameter.nbytes for parameter in model.parameters()) < MAX_GPU_FRACTION * free


def rotate_in_place(model: PreTrainedModel, device: torch.device, seed: int, online: bool = True) -> None:
    """Rotate a float32 model, wherever it is; matrices are rotated on `device`, one at a time."""
    _, blocks = find_blocks(model)
    vocabulary, width = cast(Tensor, model.get_input_embeddings().weight).shape
    signs = random_hadamard(width, width, seed)

    def residual(x: Tensor) -> Tensor:
        return signs.input(x.to(device)).to(x.device)

    def between(x: Tensor) -> Tensor:
        return hadamard(x.to(device)).to(x.device)

    ids_BT = torch.randint(vocabulary, PROBE_SHAPE, generator=torch.Generator().manual_seed(seed)).to(model.device)
    try:
        rotations = rotate_model(model, blocks, ids_BT, residual, between, online)
    except RotationError as error:
        raise ModelError(f"quantize.transforms: quarot: {error}") from None
    if rotations:
        setattr(model.config, ONLINE_ROTATIONS, {name: rotation.heads for name, rotation in rotations.items()})


def rotated_source(source: ModelSource, artifact: Artifact) -> ModelSource:
    """The source of the rotated model, for stages to read instead of the original."""
    artifact.verify()
    return replace(source, path=str(artifact.path), revision=None, fingerprint=artifact.content, load_args={})
