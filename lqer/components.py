"""Components that a configuration names: by their kind alone, or by a table of the kind and its settings.

    class Rounding(Component, family="rounding"): ...       a family: what its components have in common
    @dataclass(frozen=True)
    class Gptq(Rounding):                                   a component: found in Rounding.registry as "gptq"
        kind = "gptq"
        damping: float = 0.01

Defining a component registers it, so a module that holds a new one only has to be imported; outside of the package such
a module is a plug-in (lqer/config/plugins.py).
"""

from __future__ import annotations

import difflib
import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

# Metadata of a dataclass field that earlier artifacts were made without. At its default it is no part of their keys, so
# that a setting can be added without making anew what does not use it.
ADDED = {"added": True}


def is_as_before(described: Field[Any], value: Any) -> bool:
    """Whether a field was `ADDED`, and has the default that stands for its absence."""
    return "added" in described.metadata and bool(value == described.default)


@dataclass(frozen=True)
class Component:
    """One component and its settings: a frozen dataclass, of the family whose base it derives from.

    `kind` is what a configuration calls it, a class attribute without annotation and so not a field. Settings are
    checked in `__post_init__`, which raises ValueError. A component without settings needs no decorator.
    """

    kind: ClassVar[str]
    family: ClassVar[str]  # what such components are called in messages
    registry: ClassVar[dict[str, type[Any]]]  # the family's components by kind
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __init_subclass__(cls, family: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if family is not None:
            cls.family, cls.registry = family, {}
        elif (kind := cls.__dict__.get("kind")) is not None:
            registered = cls.registry.get(kind)
            # Defining a class again, as a notebook does, replaces it.
            if registered is not None and _full_name(registered) != _full_name(cls):
                raise ValueError(f"{cls.family} {kind!r} is defined twice: {_full_name(registered)}, {_full_name(cls)}")
            cls.registry[kind] = cls

    @property
    def identity(self) -> dict[str, Any] | None:
        """What stands for a plug-in's component in the keys of artifacts; None for a built-in one, whose stage has a
        version: kind, settings and the sha256 of its file, so that editing the file makes new artifacts.
        """
        if type(self).__module__.partition(".")[0] == __name__.partition(".")[0]:
            return None
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind, **settings, "source": _source_hash(type(self).__module__)}

    def to_dict(self) -> dict[str, Any]:
        """`kind` and the fields as TOML and JSON can write them; `component_from_dict` reads them."""
        return {"kind": self.kind, **{key: value for key, value in asdict(self).items() if value is not None}}


def component_class(family: type[Component], kind: Any) -> type[Any]:
    """The component of that kind. Raises ValueError for an unknown kind, with the nearest spelling."""
    if kind is None:
        raise ValueError(f"a {family.family} needs a kind; allowed: {', '.join(family.registry)}")
    if not isinstance(kind, str) or kind not in family.registry:
        allowed = f"allowed: {', '.join(family.registry)}{did_you_mean(str(kind), family.registry)}"
        raise ValueError(f"unknown {family.family} {kind!r}; {allowed}")
    return family.registry[kind]


def component_from_dict(family: type[Component], described: Mapping[str, Any]) -> Any:
    """The component that `Component.to_dict` described. Raises ValueError for an unknown kind, key or value."""
    cls = component_class(family, described.get("kind"))
    settings = {key: value for key, value in described.items() if key != "kind"}
    keys = [field.name for field in fields(cls)]
    for key in settings:
        if key not in keys:
            allowed = f"allowed: {', '.join(keys) or 'none'}{did_you_mean(key, keys)}"
            raise ValueError(f'unknown key {key!r} of {family.family} "{cls.kind}"; {allowed}')
    try:
        return cls(**settings)
    except TypeError as error:  # a field that is missing
        raise ValueError(f"{error} ({cls.kind})") from error


@cache
def _source_hash(module: str) -> str | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def require_range(key: str, value: Any, low: int, high: int, kind: str) -> None:
    """Raise ValueError unless a setting of the component `kind` is an integer in low..high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{key} {value!r} is not in {low}..{high} ({kind})")


def require_choice(key: str, value: Any, choices: Sequence[Any], kind: str) -> None:
    """Raise ValueError unless a setting of the component `kind` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{key} {value!r} is not one of {', '.join(map(repr, choices))} ({kind})")


def require_positive(key: str, value: Any, kind: str) -> None:
    """Raise ValueError unless a setting of the component `kind` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} {value!r} is not an integer of at least 1 ({kind})")


def require_number(key: str, value: Any, kind: str) -> None:
    """Raise ValueError unless a setting of the component `kind` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{key} {value!r} is not a number of at least 0 ({kind})")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'rank'?" where one of the choices is close to `word`, else an empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
