"""Parts that a configuration names: by their kind alone, or by a table of the kind and its settings."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar


class Component:
    """Settings of one part. Every one is a frozen dataclass deriving from this; bad settings raise ValueError."""

    kind: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, `kind` included, as TOML and JSON can write them; `component_from_dict` reads them."""
        settings = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind, **{key: value for key, value in settings.items() if value is not None}}


Part = TypeVar("Part", bound=Component)


def component_from_dict(noun: str, known: Mapping[str, type[Part]], settings: Mapping[str, Any]) -> Part:
    """The part that `Component.to_dict` described, of the kinds `known`.

    noun: what such parts are called. Raises ValueError for an unknown kind, key or value.
    """
    kind: Any = settings.get("kind")
    if kind not in known:
        raise ValueError(f"unknown {noun} {kind!r}; allowed: {', '.join(known)}{did_you_mean(str(kind), known)}")
    keys = [field.name for field in dataclasses.fields(known[kind])]  # type: ignore[arg-type]
    for key in settings:
        if key not in keys:
            allowed = f"allowed: {', '.join(keys)}{did_you_mean(key, keys)}"
            raise ValueError(f'unknown key {key!r} of {noun} "{kind}"; {allowed}')
    return known[kind](**settings)


def require_positive(key: str, value: Any, kind: str) -> None:
    """Raise ValueError unless a setting of the part `kind` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} {value!r} is not an integer of at least 1 ({kind})")


def require_number(key: str, value: Any, kind: str) -> None:
    """Raise ValueError unless a setting of the part `kind` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{key} {value!r} is not a number of at least 0 ({kind})")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'rank'?" where one of the choices is close to `word`, else an empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
