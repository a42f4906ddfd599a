"""Texts that come with CPython, for machines without a network: its help texts, and the source of its library."""

from __future__ import annotations

import hashlib
import itertools
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The first half of the characters of the help texts, sorted by topic, is for calibration.
TRAIN_SHARE = 0.5


@dataclass(frozen=True)
class PythonText:
    """read: the documents, of a split where there are any. splits: those of calibration and evaluation."""

    what: str
    summary: str
    read: Callable[[str | None], list[str]]
    splits: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The name of the text in messages and reports: it depends on the version of Python."""
        return f"{self.what} of Python {platform.python_version()}"


def help_topics(split: str | None) -> list[str]:
    """The topics of pydoc, by name: the documents up to TRAIN_SHARE for the split train, the rest for test."""
    from pydoc_data.topics import topics

    documents = [topics[key] for key in sorted(topics)]
    ends = list(itertools.accumulate(map(len, documents)))
    train = sum(end <= TRAIN_SHARE * ends[-1] for end in ends)
    return documents[:train] if split == "train" else documents[train:]


def library_modules(split: str | None = None) -> list[str]:
    """The modules of the standard library's top level as source text, each a document.

    In the order of the SHA-256 of their file names, so that every slice is a mix of them.
    """
    files = [path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.is_file()]
    files.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
    return [path.read_text(encoding="utf-8") for path in files]


PYTHON_TEXTS = {
    "pydoc": PythonText(
        "pydoc topics", "the documentation of Python's modules, without a download", help_topics, ("train", "test")
    ),
    "stdlib": PythonText(
        "stdlib modules", "the source text of Python's library, without a download: code", library_modules
    ),
}
