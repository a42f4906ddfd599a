"""What a run shows on the terminal: its own log, and little of the libraries'."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def log_on_console() -> Iterator[None]:
    """Print the messages of the log, without time or level, on stderr, while a command runs."""
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    # On our own logger: libraries add handlers to the root logger, and lines would appear twice.
    ours = logging.getLogger("lqer")
    ours.addHandler(console)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(console)


def quieten_libraries() -> None:
    """Messages of libraries only if something is wrong. Before the libraries are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
