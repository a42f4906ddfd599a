"""A stage of a run: one step from artifacts to one artifact of the store.

A stage is a frozen dataclass. Everything that its `build` reads is a field, and its key is made of those very fields:
a field that was added cannot be forgotten in the key. A field that changes no byte of the artifact, such as a memory
budget, is declared with `no_effect` and its reason; one that was `ADDED` later is left out at its default. An input
that another stage makes is a field as well and counts by that stage's own key, so that all names are known before any
work is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from lqer.components import is_as_before
from lqer.store.files import content_hash
from lqer.store.store import Artifact, Store, Workspace

log = logging.getLogger(__name__)

NO_EFFECT = "no_effect"


def no_effect(reason: str) -> dict[str, str]:
    """Metadata of a dataclass field that is left out of a stage's key: why it cannot change the artifact."""
    return {NO_EFFECT: reason}


@dataclasses.dataclass(frozen=True)
class Stage(ABC):
    """Fields are the inputs of `build`. Raise `version` whenever the same inputs give other bytes than before."""

    name: ClassVar[str]
    version: ClassVar[int]

    @abstractmethod
    def build(self, workspace: Workspace, store: Store) -> None:
        """Write the files that `workspace` does not hold yet. `store` provides the artifacts of other stages."""

    @cached_property
    def key(self) -> dict[str, Any]:
        """What decides the artifact: the version and every field that is not declared `no_effect`."""
        return {"version": self.version, **_fields(self)}

    @property
    def identity(self) -> str:
        """The name of the artifact."""
        return Store.name_of(self.name, self.key)

    @property
    def log_name(self) -> str:
        """What the stage is called in the log."""
        return self.name

    def find(self, store: Store) -> Artifact | None:
        """The artifact, if it is finished."""
        return store.find(self.name, self.key)

    def obtain(self, store: Store) -> Artifact:
        """The artifact, built if the store does not have it."""
        artifact = self.find(store)
        if artifact is not None:
            log.info("%s: reused %s", self.log_name, self.identity)
            return artifact
        artifact = store.obtain(self.name, self.key, lambda workspace: self.build(workspace, store))
        self._say_made(artifact)
        return artifact

    def provide(self, store: Store, files: Collection[str]) -> None:
        """Return once the artifact has these files: those of another process at once, else all of it is built."""
        made = store.provide(self.name, self.key, files, lambda workspace: self.build(workspace, store))
        if made is None:
            log.info("%s: reused %s", self.log_name, self.identity)
        else:
            self._say_made(made)

    def _say_made(self, artifact: Artifact) -> None:
        log.info("%s: %s in %.1f s", self.log_name, self.summary(artifact), artifact.seconds)

    def artifact(self, store: Store) -> Artifact:
        """The same for a stage that reads this one: without a line in the log if it is there."""
        return self.find(store) or self.obtain(store)

    def summary(self, artifact: Artifact) -> str:
        """What a reader of the log wants to know of a new artifact."""
        return "done"


def stages_in(value: Any) -> Iterator[Stage]:
    """The stages that a stage, or a part of one, is made of, each before those that read it; `value` itself last."""
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from stages_in(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from stages_in(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from stages_in(getattr(value, field.name))
    if isinstance(value, Stage):
        yield value


def identity(value: Any) -> Any:
    """What stands for `value` in a key, as JSON can hold it. Raises TypeError for an object that has none.

    Objects with an `identity` (stages, models, texts) answer it themselves; other dataclasses count by their fields, a
    part of a configuration also by its kind.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Tensor):
        return tensor_hash(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return value.type
    if (own := getattr(value, "identity", None)) is not None:
        return identity(own)
    if isinstance(value, BaseModel):
        return {name: identity(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): identity(entry) for key, entry in value.items()}
    if isinstance(value, Set):
        return sorted((identity(entry) for entry in value), key=content_hash)
    if isinstance(value, Sequence):
        return [identity(entry) for entry in value]
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | _fields(value)
    raise TypeError(f"a {type(value).__name__} cannot be part of a stage's key")


def _fields(value: Any) -> dict[str, Any]:
    counting = [field for field in dataclasses.fields(value) if NO_EFFECT not in field.metadata]
    values = {field: getattr(value, field.name) for field in counting}
    return {field.name: identity(found) for field, found in values.items() if not is_as_before(field, found)}


def tensor_hash(tensor: Tensor) -> str:
    """sha256 (hex) of a tensor's dtype, shape and bytes."""
    header = content_hash([str(tensor.dtype), list(tensor.shape)])
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(header.encode() + data).hexdigest()
