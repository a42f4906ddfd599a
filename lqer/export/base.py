"""What an export target is: another ecosystem's files, made from a checkpoint and read back by its library.

A target is a frozen dataclass of its settings in a file of its own. It says of a linear why it cannot hold it, writes
the folder, and reads it back for the comparison in lqer/export/verify.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import AutoConfig, PreTrainedModel

from lqer.components import Component
from lqer.errors import ExportError
from lqer.export.source import LinearSpec, Outline, Source
from lqer.models.auto import auto_class, without_values
from lqer.models.coded import QUANTIZATION_CONFIG
from lqer.models.verify import quiet_loading, refuse_mismatch

# How near the written model is to the checkpoint: bit for bit; but for the order of sums in float32; with weights that
# were rounded once more; or with inputs rounded by a slightly other rule. lqer/export/verify.py has the bounds.
Closeness = Literal["exact", "reordered", "rounded", "other inputs"]


@dataclass(frozen=True)
class Written:
    """What a target made of a checkpoint."""

    closeness: Closeness
    # What a reader must know of the files, a sentence each.
    notes: tuple[str, ...] = ()


class Target(Component, ABC, family="export target"):
    """Settings of one target."""

    # Packages that read the files back; without them an export stays unverified.
    readers: ClassVar[tuple[str, ...]] = ()
    # Which library a hub should take the files for, and the tag that finds them there.
    library_name: ClassVar[str] = "transformers"
    tags: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def unsupported(self, spec: LinearSpec) -> str | None:
        """Why this target cannot hold a linear; None if it can."""

    def unsupported_experts(self, model: Outline) -> tuple[str, str] | None:
        """A linear of an expert that it cannot hold, and why; None if it holds them all, or there are none."""
        reason = "it is a linear of an expert, which this target does not write"
        return next(((name, reason) for name in model.expert_linears), None)

    def unsupported_model(self, model: Outline) -> tuple[str, str] | None:
        """A linear that it could hold, but not together with the others of this model, and why; None if there is none.

        Called where `unsupported` has accepted every linear.
        """
        return None

    def check_inputs(self) -> None:
        """Raise ConfigError for a setting that names a file which cannot be used."""
        return

    def keeps_activation(self, spec: LinearSpec) -> bool:
        """Whether inputs are rounded there as the checkpoint rounds them."""
        return spec.activation is None

    def drops_attention(self, source: Source) -> bool:
        """Whether the checkpoint rounds the operands of attention, and the files do not have it done."""
        return source.rounds_attention

    @property
    def most_bits(self) -> float:
        """An upper bound of the bits of a quantized weight in the files, with its scales and without factors."""
        return 11.0

    def dtype_of_check(self, source: Source) -> torch.dtype:
        """The dtype in which the files are compared with the checkpoint."""
        return torch.float32

    @abstractmethod
    def write(self, source: Source, folder: Path) -> Written:
        """Write the files. Raises ExportError, naming the linear, for values that the target cannot hold."""

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """The model in those files, on the CPU, as the target's library reads it."""

    @abstractmethod
    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        """How the files in a folder are used, by the name of the program or library."""

    def missing_reader(self) -> str | None:
        """The package without which the files cannot be read back here; None if nothing is missing."""
        return first_missing(self.readers)


def first_missing(packages: Iterable[str]) -> str | None:
    """The first of these packages that is not installed."""
    return next((name for name in packages if find_spec(name) is None), None)


def unsupported_basis(spec: LinearSpec) -> str | None:
    """Why a linear is not a plain matrix of its format: in which basis it was rounded."""
    if spec.is_rotated:
        return "its weight was rounded in a rotated basis"
    if spec.online is not None:
        return "its inputs are rotated at run time"
    return None


def unsupported_extras(spec: LinearSpec) -> str | None:
    """Why a linear is more than a matrix of its format; None if it is not."""
    factors = f"it has low-rank factors (rank {spec.rank})" if spec.rank else None
    return unsupported_basis(spec) or factors


def unsupported_transposed(model: Outline) -> tuple[str, str] | None:
    """A linear whose weight the architecture keeps as (I, O), and that as the reason; None if there is none."""
    name = next((name for name in model.specs if model.stores_transposed(name)), None)
    return None if name is None else (name, "its architecture stores weights transposed (Conv1D)")


def load_pretrained(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """What transformers makes of a folder. Raises ModelError if a tensor is missing or left over."""
    options |= {"output_loading_info": True, "trust_remote_code": False}
    with quiet_loading():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = auto_class(config).from_pretrained(folder, dtype=dtype, **options)
    model, found = loaded
    refuse_mismatch(folder.name, found)
    return model.eval()


def load_weights(folder: Path, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder's configuration with these tensors. Raises ExportError if one is missing or left over."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    vars(config).pop(QUANTIZATION_CONFIG, None)  # of the folder's files, not of these weights
    with without_values():
        cls: Any = type(auto_class(config).from_config(config))
    with quiet_loading():
        model, found = cls.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True
        )
    refuse_mismatch(folder.name, found)
    return model.eval()


def refuse_value(spec: LinearSpec, reason: str) -> ExportError:
    """The error for values of a linear that the target cannot hold."""
    return ExportError(f"{spec.name}: {reason}")
