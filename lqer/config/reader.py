"""Reads a configuration: TOML files that extend one another, then `--section.key=value` overrides, then the schema.

The source of every value is recorded, so that an error can name the file or override.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from lqer.config.explain import explain, explain_rule
from lqer.config.files import MAX_DEPTH, parse_toml, read_toml, reason_of, shortened
from lqer.config.presets import PREFIX, preset_path
from lqer.config.rules import broken_rules
from lqer.config.schema import Config
from lqer.errors import ConfigError

Key = tuple[str, ...]
# Where values come from, and the values.
Layer = tuple[str, Mapping[str, Any]]
# Files that extend one another.
MAX_CHAIN = 32
# Keys that replace another key of their table: setting one in a later layer unsets the other of an earlier layer.
INSTEAD_OF: dict[Key, str] = {("quantize", "low_rank", "budget_bits"): "rank"}
# Components that an earlier layer may have named by their kind alone, before a later one sets a key of theirs.
NAMED_BY_KIND: frozenset[Key] = frozenset({("quantize", "method"), ("quantize", "rounding")})


@dataclass
class Layers:
    """Merged TOML values and, for each leaf, the name of the file or override that set it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    def merge(self, values: Mapping[str, Any], origin: str) -> None:
        self._merge(self.values, values, (), origin)

    def _merge(self, into: dict[str, Any], values: Mapping[str, Any], prefix: Key, origin: str) -> None:
        for name, value in values.items():
            key = (*prefix, name)
            if key in NAMED_BY_KIND and isinstance(value, dict) and isinstance(into.get(name), str):
                into[name] = {"kind": into[name]}
            if isinstance(value, dict) and isinstance(into.get(name), dict) and not _another_kind(into[name], value):
                self._merge(into[name], value, key, origin)
                continue
            into[name] = {} if isinstance(value, dict) else value
            self.origins.pop(key, None)
            self.origins[key] = origin
            if isinstance(value, dict):
                self._merge(into[name], value, key, origin)
            if key in INSTEAD_OF and INSTEAD_OF[key] not in values:
                into.pop(INSTEAD_OF[key], None)
                self.origins.pop((*prefix, INSTEAD_OF[key]), None)

    def origin(self, key: Sequence[str | int]) -> str | None:
        """The layer that set `key`: for a table the last one that changed it, for an absent key that of its table."""
        names = tuple(str(name) for name in key)
        within = [origin for set_key, origin in self.origins.items() if set_key[: len(names)] == names]
        if within:
            return within[-1]
        for end in range(len(names), 0, -1):
            if names[:end] in self.origins:
                return self.origins[names[:end]]
        return None


def _another_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """A component of another kind replaces the old one: settings of two kinds do not mix."""
    return "kind" in new and new["kind"] != old.get("kind")


def read_config(
    path: str | Path, tag: str | None = None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Config:
    """Read `path`, a file or preset:NAME, with everything it extends; apply `overrides` ("--section.key=value") and
    `values`, nested as in TOML; check it against the schema and the rules across sections.

    Raises ConfigError, one line: where the key was set, the rule, the value found, what is allowed.
    """
    layers = read_layers(path)
    layers += [(override, parse_override(override)) for override in overrides]
    layers += [("the call", values or {})]
    layers += [("the command line", {"tag": tag})] if tag is not None else []
    return config_of(layers)


def read_layers(path: str | Path, folder: Path = Path()) -> list[Layer]:
    """The values of `path`, a file relative to `folder` or preset:NAME, after those of the files that it extends.

    The first layer is the default of the tag, the file's name.
    """
    path = _locate(str(path), folder)
    return [(str(path), {"tag": path.stem}), *((str(file), found) for file, found in _read_file(path, (), set()))]


def config_of(layers: Sequence[Layer]) -> Config:
    """The configuration of merged layers, later ones win. Raises ConfigError as `read_config` does."""
    merged = Layers()
    for origin, values in layers:
        merged.merge(values, origin)

    def origin_of(key: Sequence[str | int]) -> str:
        # A key that no layer has is missing from the file that was asked for.
        return (merged.origin(key) if key else "") or layers[0][0]

    try:
        # JSON mode is strict about types (no "4" for 4) while lists may still become tuples and tables classes.
        config = Config.model_validate_json(json.dumps(merged.values, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, merged.values, origin_of)) from None
    for broken in broken_rules(config):
        raise ConfigError(explain_rule(broken, origin_of))
    return config


def _read_file(path: Path, chain: tuple[Path, ...], read: set[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return [(file, its own values)], extended files first; a file that several extend counts once, where it is first.

    chain: the files that led here; read: those that have been read.
    """
    where = f"{_shown(chain[-1])}: extends: " if chain else ""
    if len(chain) > MAX_CHAIN:
        raise ConfigError(f"{where}more than {MAX_CHAIN} files extend one another")
    values = read_toml(path, where)
    resolved = path.resolve()
    if resolved in chain:
        cycle = " -> ".join(file.name for file in (*chain, path))
        raise ConfigError(f"{where}the files extend one another in a circle: {cycle}")
    if resolved in read:
        return []
    read.add(resolved)
    parents = values.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise ConfigError(f"{path}: extends: must be a file name or a list of file names; found {parents!r}")
    files: list[tuple[Path, dict[str, Any]]] = []
    for parent in parents:
        files += _read_file(_locate(parent, path.parent), (*chain, resolved), read)
    return [*files, (path, values)]


def _locate(name: str, folder: Path) -> Path:
    """The file that `extends`, or a command line, names: relative to `folder`, or a preset."""
    if name.startswith(PREFIX):
        return preset_path(name.removeprefix(PREFIX))
    return Path(os.path.normpath(folder / name))


def _shown(path: Path) -> Path:
    """A resolved path, relative to the working directory if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def parse_override(override: str) -> dict[str, Any]:
    """'--a.b=1' -> {"a": {"b": 1}}. The value is read as TOML; what is no TOML is taken as a string.

    Raises ConfigError if the argument has another shape.
    """
    name, equals, text = override.removeprefix("--").partition("=")
    keys = name.split(".")
    if not override.startswith("--") or not equals or not all(keys):
        raise ConfigError(f"{shortened(override)}: an override has the form --section.key=value")
    if len(keys) > MAX_DEPTH:
        raise ConfigError(f"{shortened(override)}: the key has {len(keys)} parts, at most {MAX_DEPTH} are possible")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        value = text
    except (ValueError, KeyError, RecursionError) as error:
        raise ConfigError(f"{shortened(override)}: {reason_of(error)}") from None
    for key in reversed(keys):
        value = {key: value}
    return value
