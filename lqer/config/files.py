"""Reads one TOML file within bounds: whatever the file is, the answer is its values or a ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli

from lqer.errors import ConfigError

MAX_BYTES = 1_000_000
# Tables and arrays inside one another. The schema has four levels.
MAX_DEPTH = 16
# Characters of what a message quotes.
MOST_QUOTED = 80


def read_toml(path: Path, asked_by: str = "") -> dict[str, Any]:
    """The values of a file. asked_by: begins the message where the file cannot be read, "base.toml: extends: "."""
    try:
        if path.is_dir():
            raise ConfigError(f"{asked_by}{path} is a folder, not a config file")
        # A pipe would wait for ever, a device has no end.
        if path.exists() and not path.is_file():
            raise ConfigError(f"{asked_by}{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{asked_by}no such config file: {path}") from None
    except (OSError, ValueError, RuntimeError) as error:
        # A name that is too long or holds a NUL, a loop of links, no permission.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{asked_by}{shortened(str(path))} cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{asked_by}{path} is larger than {MAX_BYTES} bytes")
    try:
        return parse_toml(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {reason_of(error)}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a TOML text. Raises ValueError where it is not TOML or nested too deep, RecursionError likewise."""
    values = tomli.loads(text)
    if too_deep(values, MAX_DEPTH):
        raise ValueError(f"tables and arrays are nested more than {MAX_DEPTH} deep")
    return values


def too_deep(value: Any, levels: int) -> bool:
    """Whether tables and arrays are nested more than `levels` deep."""
    if not isinstance(value, Mapping | list):
        return False
    entries = value.values() if isinstance(value, Mapping) else value
    return levels == 0 or any(too_deep(entry, levels - 1) for entry in entries)


def reason_of(error: Exception) -> str:
    """The first line of a parser's complaint."""
    return "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]


def shortened(text: str) -> str:
    """A text that a message can quote."""
    return text if len(text) <= MOST_QUOTED else f"{text[:MOST_QUOTED]}… ({len(text)} characters)"
