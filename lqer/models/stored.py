"""Which parameters of a model a tensor of its checkpoint holds, where names differ, or experts are stored one by one.

A checkpoint may hold the experts of a layer as transformers does, or each expert's linears under names of their own,
which transformers merges as it loads them. Here both become the linears of split experts (lqer/nn/stacked.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from lqer.nn.stacked import Piece, stacks

# What transformers may do to a checkpoint's tensors: rename them, which leaves their values and their number as they
# are, and put experts together, one tensor per expert, of gate and up the rows of both.
RENAMINGS = (WeightRenaming, PrefixChange)
MERGING = ((MergeModulelist,), (MergeModulelist, Concatenate))


class NotStreamableError(Exception):
    """The reason why a model cannot be read block by block."""


@dataclass(frozen=True)
class StoredNames:
    """What transformers calls the tensors of a checkpoint. stacks: see `lqer.nn.stacked`."""

    prefix: str
    parameters: dict[str, Any]
    stacks: dict[str, dict[str, Piece]]
    renamings: list[Any]
    converters: list[WeightConverter]

    @classmethod
    def of(cls, model: PreTrainedModel) -> StoredNames:
        """The names of a model that is not split yet. Raises NotStreamableError where transformers computes tensors."""
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        renamings = [one for one in transforms if type(one) in RENAMINGS]
        converters = [
            one
            for one in transforms
            if isinstance(one, WeightConverter) and tuple(map(type, one.operations)) in MERGING
        ]
        if len(renamings) + len(converters) < len(transforms):
            raise NotStreamableError(f"transformers converts the tensors of {type(model).__name__}")
        return cls(model.base_model_prefix, dict(model.state_dict()), stacks(model), renamings, converters)

    def parameters_in(self, stored: str) -> dict[str, Piece | None]:
        """The parameters of the split model that a stored tensor holds: the whole of it, or pieces; may be none."""
        # A checkpoint of the base model alone has no prefix; one of an enclosing model may have one more.
        prefix = f"{self.prefix}."
        for spelling in (stored, f"{prefix}{stored}", stored.removeprefix(prefix)):
            if spelling in self.stacks:
                return dict(self.stacks[spelling])
            if spelling in self.parameters:
                return {spelling: None}
        if not self.renamings and not self.converters:
            return {}
        name, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, self.parameters)
        if pattern is None:
            return dict(self.stacks[name]) if name in self.stacks else {name: None}
        converter = next(one for one in self.converters if pattern in one.source_patterns)
        expert = next(part for part in reversed(stored.split(".")) if part.isdigit())
        places = [key for key in self.stacks.get(name, {}) if key.split(".")[-3] == expert]
        if not places and name in self.stacks:
            # It belongs to an expert that passes its tokens on: transformers stacks it, and nothing reads it.
            return {}
        if len(places) != len(converter.source_patterns):
            raise NotStreamableError(f"transformers converts {stored} into {name}")
        return {places[converter.source_patterns.index(pattern)]: None}


def saved_names(model: PreTrainedModel) -> dict[str, str]:
    """What transformers calls tensors where it saves a model, by their names in the split model.

    Those alone that are whole tensors there: experts that it saves stacked are not among them. Raises
    NotStreamableError as `StoredNames.of` does.
    """
    names = StoredNames.of(model)
    saved = revert_weight_conversion(model, dict(names.parameters))
    found = ((stored, names.parameters_in(stored)) for stored in saved)
    return {name: stored for stored, places in found for name, piece in places.items() if piece is None}
