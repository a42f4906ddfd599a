"""Turns a schema error into one line: where the key was set, the rule, the value found, and what is allowed."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from lqer.components import Component, did_you_mean
from lqer.config.rule import KeyedError
from lqer.config.schema import Config
from lqer.config.section import Loc

# pydantic's error types for a key that a model, or a dataclass, does not have.
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def explain(error: ValidationError, values: Mapping[str, Any], origin: Callable[[Loc], str]) -> str:
    """The first of `error`'s complaints about `values` as one line."""
    # A misspelt key is reported twice, as unknown and as missing: the first is more helpful.
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda found: found["type"] not in UNKNOWN_KEY)
    loc = _without_tags(first["loc"], values)
    found = _lookup(values, loc)
    kind = first["type"]
    if kind in UNKNOWN_KEY:
        allowed = _keys_at(Config, loc[:-1], values)
        return _line(origin(loc), loc, "unknown key", None, allowed, misspelt=str(loc[-1]))
    if kind == "missing":
        return _line(origin(loc[:-1]), loc, "is missing", None, None)
    alternatives = [other for other in errors if _without_tags(other["loc"], values) == loc]
    if len(alternatives) > 1:  # a value of none of a union's types
        rules = [other["msg"].removeprefix("Input should be ") for other in alternatives]
        return _line(origin(loc), loc, f"must be {' or '.join(rules)}", found, None)
    if kind in ("literal_error", "enum"):
        allowed = tuple(part.strip(" '\"") for part in first["ctx"]["expected"].replace(" or ", ", ").split(","))
        return _line(origin(loc), loc, "not allowed", found, allowed)
    if kind == "too_short":
        return _line(origin(loc), loc, f"must name at least {first['ctx']['min_length']}", found, None)
    rule = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").replace("an object", "a table")
    rule = rule if kind == "value_error" else f"must be {rule}"
    # A rule of our own may quote the value already.
    quoted = kind == "value_error" and (isinstance(found, Mapping) or repr(found) in rule)
    return _line(origin(loc), loc, rule, None if quoted else found, None)


def explain_rule(error: KeyedError, origin: Callable[[Loc], str]) -> str:
    """A broken rule across sections as one line."""
    return _line(origin(error.loc), error.loc, error.rule, error.found, error.allowed)


def _line(
    origin: str,
    loc: Loc,
    rule: str,
    found: object,
    allowed: Sequence[str] | None,
    misspelt: str | None = None,
) -> str:
    line = f"{origin}: {'.'.join(map(str, loc))}: {rule}" if loc else f"{origin}: {rule}"
    if found is not None:
        line += f"; found {found!r}"
    if allowed:
        line += f"; allowed: {', '.join(allowed)}"
        line += did_you_mean(misspelt or str(found), allowed)
    return line


def _without_tags(loc: Loc, values: Any) -> Loc:
    """Drop the tags of unions that pydantic puts into a location: they are not keys of the TOML file."""
    kept: list[str | int] = []
    for i, part in enumerate(loc):
        is_key = isinstance(values, Mapping) and part in values
        is_index = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if is_key or is_index:
            kept.append(part)
            values = values[part]
        elif i == len(loc) - 1 and isinstance(values, Mapping) and values.get("kind") != part:
            kept.append(part)
    return tuple(kept)


def _lookup(values: Any, loc: Loc) -> Any:
    for part in loc:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _keys_at(model: Any, loc: Loc, values: Any) -> tuple[str, ...] | None:
    """The keys that the schema knows in the table at `loc`."""
    for part in loc:
        values = _lookup(values, (part,))
        if isinstance(part, int):  # an entry of a list, whose class is known
            continue
        if typing.get_origin(model) is dict:
            model = _class_in(typing.get_args(model)[1], values)
        elif isinstance(model, type) and issubclass(model, BaseModel):
            model = _class_in(model.model_fields[part].annotation, values)
    if isinstance(model, type) and issubclass(model, BaseModel):
        return tuple(model.model_fields)
    if is_dataclass(model):
        return tuple(f.name for f in fields(model))
    return None


def _class_in(annotation: Any, values: Any) -> Any:
    """The schema class in an annotation such as `Section | None` or `tuple[Section, ...]`.

    For a family of components: the class of the kind that `values` names.
    """
    if isinstance(annotation, type) and issubclass(annotation, Component):
        kind = values.get("kind") if isinstance(values, Mapping) else values
        return annotation.registry.get(str(kind), annotation)
    if typing.get_origin(annotation) is Annotated:
        return _class_in(typing.get_args(annotation)[0], values)
    if typing.get_origin(annotation) is dict or isinstance(annotation, type):
        return annotation
    candidates = [_class_in(arg, values) for arg in typing.get_args(annotation) if arg is not type(None)]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return candidates[0] if candidates else annotation
