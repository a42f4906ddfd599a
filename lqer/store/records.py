"""The records of an artifact's files and their hashes: its manifest, and its journal while it is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lqer.errors import StoreError
from lqer.phases import in_phase
from lqer.store.files import hash_file

MANIFEST = "manifest.json"
JOURNAL = "journal.json"


def read_record(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest or journal with entries of these types. Raises StoreError if it is missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; {mend(path.parent)}") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise StoreError(f"{path} is damaged ({error}); {mend(path.parent)}") from None
    for name, kinds in types.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kinds):
            raise StoreError(f'{path} is damaged (no valid entry "{name}"); {mend(path.parent)}')
    return record


@in_phase("verify")
def check_file(path: Path, recorded: str | None, folder: Path) -> None:
    """Raise StoreError, naming the file of an artifact's folder, unless it is there with the recorded hash."""
    if not path.is_file():
        raise StoreError(f"{path} is missing; {mend(folder)}")
    if recorded is None:
        raise StoreError(f"{path} is not in the manifest; {mend(folder)}")
    if hash_file(path) != recorded:
        raise StoreError(f"{path} is damaged (its hash is not the recorded one); {mend(folder)}")


def mend(folder: Path) -> str:
    """What a user can do about a damaged folder."""
    return f"remove {folder} to rebuild it"
