"""A finished checkpoint as exporters read it: one decoder block at a time, every linear with all that belongs to it.

What an exporter must know before it writes anything (format, shape, rank, rotations) stands in lqer.json and
config.json and is a `LinearSpec`; the values are read afterwards, block by block, each file held against the manifest.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lqer.checkpoint.backend import formats_of
from lqer.checkpoint.pack import DETAILS_FILE, FACTOR_ROLES, FORMAT_VERSION, OUTSIDE_FILE, packed_parts, unpack_role
from lqer.checkpoint.verify import CheckpointFiles
from lqer.errors import ExportError
from lqer.formats import NumberFormat, QuantizedTensor
from lqer.models.auto import auto_class, without_values
from lqer.models.coded import QUANTIZATION_CONFIG
from lqer.models.files import reported_as
from lqer.models.reading import read_file
from lqer.models.stored import NotStreamableError, saved_names
from lqer.models.structure import ONLINE_ROTATIONS
from lqer.nn.stacked import Piece, stacked, stacks
from lqer.results import RESULTS_FILE
from lqer.store.names import CHECKPOINT_LINK, block_file, checkpoint_in
from lqer.store.records import JOURNAL, MANIFEST
from lqer.transforms import LinearTransform, Rotation, transform_from_dict
from lqer.transforms.hadamard import hadamard
from lqer.transforms.quarot import OnlineRotation

CPU = torch.device("cpu")
CONFIG_FILE = "config.json"
# Files of a checkpoint that are no part of a model's folder elsewhere.
OWN_FILES = re.compile(
    rf"{DETAILS_FILE}|{CONFIG_FILE}|{MANIFEST}|{JOURNAL}|.*\.safetensors|[a-z]+-\d+\.json|.*\.md|\..*"
)


@dataclass(frozen=True)
class LinearSpec:
    """What a quantized linear is, without its values."""

    name: str
    format: NumberFormat
    out_features: int
    in_features: int
    rank: int = 0
    activation: NumberFormat | None = None
    is_rotated: bool = False  # rounded in a basis of its own
    online: OnlineRotation | None = None  # of its inputs, at run time


@dataclass(frozen=True, eq=False)
class Linear:
    """A quantized linear with its values, on the CPU; factors and bias dequantized to float32."""

    spec: LinearSpec
    weight_OI: QuantizedTensor
    a_IR: Tensor | None
    b_RO: Tensor | None
    bias_O: Tensor | None  # in its stored dtype where it was not rounded
    rotation: Rotation | None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def biases(self) -> dict[str, Tensor]:
        """The bias under its name, where there is one."""
        return {} if self.bias_O is None else {f"{self.name}.bias": self.bias_O}


class Outline:
    """A model without its values: what a target must know to say whether it can hold it.

    specs: of every quantized linear by name, in the order of the model. modules: those of the original architecture.
    """

    def __init__(self, specs: Mapping[str, LinearSpec], modules: Mapping[str, nn.Module]):
        self.specs, self.modules = specs, modules

    @cached_property
    def expert_linears(self) -> list[str]:
        """The quantized linears of experts, which are no modules of the original architecture."""
        return [name for name in self.specs if name not in self.modules]

    @cached_property
    def routers(self) -> list[str]:
        """The modules beside experts whose matrix is no linear's."""
        mixtures = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in self.stacks)
        children = [f"{mixture}.{name}" for mixture in mixtures for name, _ in self.modules[mixture].named_children()]
        return [
            name
            for name in children
            if not isinstance(self.modules[name], nn.Linear)
            and getattr(getattr(self.modules[name], "weight", None), "ndim", 0) == 2
        ]

    @cached_property
    def saved_names(self) -> dict[str, str]:
        """The names of tensors in the original's own files, see lqer/models/stored.py; {} where none are known."""
        try:
            return saved_names(cast(PreTrainedModel, self.modules[""]))
        except NotStreamableError:
            return {}

    @cached_property
    def stacks(self) -> dict[str, dict[str, Piece]]:
        """The tensors of experts by the stacked parameters that they are pieces of, see lqer/nn/stacked.py."""
        return stacks(self.modules[""])

    def stack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` of whole blocks under the names and in the shapes of the original architecture."""
        shapes = {name: self.modules[""].get_parameter(name).shape for name in self.stacks}
        return stacked(tensors, self.stacks, shapes)

    def stores_transposed(self, name: str) -> bool:
        """Whether the original architecture keeps this linear's weight as (I, O), as GPT-2 does."""
        return isinstance(self.modules.get(name), Conv1D)

    def unquantized_linears(self) -> list[str]:
        """The linears of the model that are not quantized, the head and routers among them."""
        linears = [name for name, one in self.modules.items() if isinstance(one, nn.Linear) and name not in self.specs]
        return linears + self.routers


def modules_of(config: PretrainedConfig) -> dict[str, nn.Module]:
    """The modules of an architecture by name, without values."""
    with without_values():
        return dict(auto_class(config).from_config(config).named_modules())


class Source(Outline):
    """The checkpoint at `path`, or the one of the run whose folder that is.

    results: results.json of the run that made it, where that is not in the run's folder yet. Raises ExportError or
    ModelError for a folder that is neither, a damaged file, or one of another version.
    """

    def __init__(self, path: Path, results: Mapping[str, Any] | None = None):
        run = path.parent if path.name == CHECKPOINT_LINK else path
        self.run = run if (run / RESULTS_FILE).is_file() else None
        self.path = checkpoint_in(path)
        if not (self.path / DETAILS_FILE).is_file():
            if not path.exists():
                raise ExportError(f"{path}: no such folder")
            raise ExportError(f"{path} has no {DETAILS_FILE}: neither a checkpoint nor a run that is finished")
        self._files = CheckpointFiles(self.path, verify=True)
        with reported_as(f"{self.path / DETAILS_FILE} is damaged"):
            self.details = self._json(DETAILS_FILE)
            if (version := self.details["format_version"]) != FORMAT_VERSION:
                raise ExportError(f"{self.path / DETAILS_FILE}: format_version {version} is not {FORMAT_VERSION}")
            self.blocks, self._name = self.details["blocks"]["count"], self.details["blocks"]["name"]
        with reported_as(f"{self.path / CONFIG_FILE} is damaged"):
            self.stored_config = self._json(CONFIG_FILE)
        if not self.details["linears"]:
            raise ExportError(f"{path} has no quantized linear: use the original model")
        with reported_as(f"{self.path / DETAILS_FILE} is damaged"):
            specs = {name: self._spec(name, entry) for name, entry in self.details["linears"].items()}
        with reported_as(f"{self.path} has no usable {CONFIG_FILE}"):
            super().__init__(specs, modules_of(AutoConfig.from_pretrained(self.path, trust_remote_code=False)))
        if results is None and self.run is not None:
            results = json.loads((self.run / RESULTS_FILE).read_text(encoding="utf-8"))
        self.results = results  # None for a checkpoint on its own
        self._files.verify(except_for=[*map(block_file, range(self.blocks)), OUTSIDE_FILE])

    def _json(self, name: str) -> dict[str, Any]:
        return json.loads(self._files.file(name).read_text(encoding="utf-8"))

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the plain model: without what names lqer, and without rotations at run time."""
        dropped = (QUANTIZATION_CONFIG, ONLINE_ROTATIONS)
        return {key: value for key, value in self.stored_config.items() if key not in dropped}

    @property
    def key(self) -> str:
        """What tells this checkpoint from another: a hash of all its files, as its manifest has them."""
        return self._files.content

    def _spec(self, name: str, entry: Mapping[str, Any]) -> LinearSpec:
        online = self.stored_config.get(ONLINE_ROTATIONS, {})
        weight, activation = formats_of(entry)
        out_features, in_features = entry["weight"]["shape"]
        return LinearSpec(
            name=name,
            format=weight,
            out_features=out_features,
            in_features=in_features,
            rank=sum(entry[role]["shape"][1] for role in ("first_a", "low_rank_a") if role in entry),
            activation=activation,
            is_rotated="transform" in entry,
            online=OnlineRotation(hadamard, online[name]) if name in online else None,
        )

    @property
    def rounds_attention(self) -> bool:
        return self.details["attention"] is not None

    def copy_weights(self, folder: Path) -> list[Path]:
        """Copy the files that hold the checkpoint's tensors, as they are. Returns the copies."""
        names = [*map(block_file, range(self.blocks)), OUTSIDE_FILE]
        return [Path(shutil.copyfile(self._files.file(name), folder / name)) for name in names]

    def read(self) -> Iterator[tuple[list[Linear], dict[str, Tensor]]]:
        """The quantized linears and the other tensors of each decoder block, then those of everything outside."""
        for index in range(self.blocks):
            tensors = self._tensors(block_file(index))
            prefix = f"{self._name}.{index}."
            linears = [self._linear(tensors, spec) for spec in self.specs.values() if spec.name.startswith(prefix)]
            taken = tuple(f"{linear.name}." for linear in linears)
            yield linears, {name: tensor for name, tensor in tensors.items() if not name.startswith(taken)}
        yield [], self._tensors(OUTSIDE_FILE)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        file = self._files.file(name)
        with reported_as(f"{file} is damaged"):
            return read_file(file)

    def _linear(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> Linear:
        entry = self.details["linears"][spec.name]
        with reported_as(f"{self.path} does not hold what {DETAILS_FILE} says of {spec.name}"):
            roles = {
                role: unpack_role(tensors, spec.name, role, entry, CPU) for role in ("weight", "bias", *FACTOR_ROLES)
            }
            weight, bias = roles["weight"], roles["bias"]
            assert weight is not None
            return Linear(
                spec=spec,
                weight_OI=weight,
                a_IR=_joined(roles["first_a"], roles["low_rank_a"], 1),
                b_RO=_joined(roles["first_b"], roles["low_rank_b"], 0),
                bias_O=tensors.get(f"{spec.name}.bias") if bias is None else bias.dequantize(),
                rotation=_rotation(tensors, spec, entry),
            )

    def copy_surroundings(self, folder: Path) -> None:
        """Copy tokenizer, chat template and generation settings."""
        for file in sorted(self.path.iterdir()):
            if not OWN_FILES.fullmatch(file.name) and file.is_file():
                shutil.copyfile(self._files.file(file.name), folder / file.name)


def _joined(first: QuantizedTensor | None, rest: QuantizedTensor | None, along: int) -> Tensor | None:
    stored = [factor.dequantize() for factor in (first, rest) if factor is not None]
    return torch.cat(stored, dim=along) if stored else None


def _rotation(tensors: Mapping[str, Tensor], spec: LinearSpec, entry: Mapping[str, Any]) -> Rotation | None:
    if not spec.is_rotated:
        return None
    transform = transform_from_dict(entry["transform"])
    assert isinstance(transform, LinearTransform)
    packed = packed_parts(tensors, f"{spec.name}.transform.", CPU)
    return transform.unpack(packed, spec.out_features, spec.in_features)
