"""Texts as a command line names them."""

from __future__ import annotations

from lqer.data.datasets import DatasetSpec
from lqer.errors import ConfigError


def text_spec(text: str) -> DatasetSpec:
    """The dataset of PATH or PATH@ROWS."""
    path, _, rows = text.partition("@")
    try:
        return DatasetSpec(path=path, rows=rows or None)
    except ValueError as error:
        reason = str(error).splitlines()[2].strip()
        raise ConfigError(f"text {text!r}: {reason}") from None
