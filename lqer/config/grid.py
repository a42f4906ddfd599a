"""Axes of a grid: what each of their values is called, and the keys of a configuration that it sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lqer.components import did_you_mean
from lqer.errors import ConfigError

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Choice:
    """A value of an axis: what it is called, and the keys of a configuration that it sets."""

    label: str
    values: Mapping[str, Any]


def axes_of(path: str, where: str, grid: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, list[Choice]]:
    """The choices by the name of their axis: a dotted key of the configuration, or the name of a list of named sets."""
    axes: dict[str, list[Choice]] = {}
    for key, found in _leaves(substituted(path, where, grid, parameters)):
        if not isinstance(found, list) or not found:
            rule = "must be a list of values" if not isinstance(found, list) else "is an empty list"
            raise ConfigError(f"{path}: {where}.{key}: {rule}; found {found!r}")
        axes[key] = [_choice(f"{path}: {where}.{key}", key, value) for value in found]
    return axes


def _choice(where: str, key: str, value: Any) -> Choice:
    if isinstance(value, dict):
        if not isinstance(value.get("name"), str):
            raise ConfigError(f'{where}: a set of keys needs a name: {{ name = "…", … }}; found {value!r}')
        return Choice(value["name"], {name: inner for name, inner in value.items() if name != "name"})
    if isinstance(value, list):
        raise ConfigError(f'{where}: a list needs a name: {{ name = "…", {key} = … }}; found {value!r}')
    values: Any = value
    for part in reversed(key.split(".")):
        values = {part: values}
    return Choice(str(value), values)


def _leaves(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables, whether they were written as one key or as several."""
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def substituted(path: str, where: str, value: Any, parameters: Mapping[str, Any]) -> Any:
    """The value with every string "$name" replaced by that parameter."""
    if isinstance(value, dict):
        return {name: substituted(path, where, inner, parameters) for name, inner in value.items()}
    if isinstance(value, list):
        return [substituted(path, where, inner, parameters) for inner in value]
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    if value[1:] not in parameters:
        known = did_you_mean(value[1:], parameters)
        raise ConfigError(f"{path}: {where}: no such parameter: {value}{known}")
    return parameters[value[1:]]


def named(path: str, template: str, cell: Mapping[str, Choice]) -> str:
    """The name with every "{axis}" replaced by what its value is called."""

    def label(found: re.Match[str]) -> str:
        if found[1] not in cell:
            allowed = f"axes: {', '.join(cell)}" if cell else "there is no grid"
            raise ConfigError(f"{path}: name {template!r}: no such axis: {found[1]}; {allowed}")
        return cell[found[1]].label

    return PLACEHOLDER.sub(label, template)
