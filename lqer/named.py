"""Parts that a configuration names: by their kind alone, or by a table of the kind and its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar


class Named:
    """Settings of one part. Every one is a frozen dataclass deriving from this; bad settings raise ValueError."""

    kind: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, `kind` included, as TOML and JSON can write them; `named_from_dict` reads them."""
        settings = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind, **{key: value for key, value in settings.items() if value is not None}}


Part = TypeVar("Part", bound=Named)


def named_from_dict(noun: str, known: Mapping[str, type[Part]], settings: Mapping[str, Any]) -> Part:
    """The part that `Named.to_dict` described, of the kinds `known`.

    noun: what such parts are called. Raises ValueError for an unknown kind, key or value.
    """
    kind: Any = settings.get("kind")
    if kind not in known:
        raise ValueError(f"unknown {noun} {kind!r}; allowed: {', '.join(known)}")
    keys = [field.name for field in dataclasses.fields(known[kind])]  # type: ignore[arg-type]
    for key in settings:
        if key not in keys:
            raise ValueError(f'unknown key {key!r} of {noun} "{kind}"; allowed: {", ".join(keys)}')
    return known[kind](**settings)
