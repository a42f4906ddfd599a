"""Imports of torch, transformers and what stands on them: a million objects that stay for as long as the process.

Python's garbage collector would walk through them again and again while they are made, a fifth of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from lqer.run.outcome import INTERRUPTED, interrupted_at_once


@contextmanager
def heavy_imports(said: str = INTERRUPTED) -> Iterator[None]:
    """Within, nothing is collected, and Ctrl-C ends the program on the spot, with these words on stderr."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with interrupted_at_once(said):
            yield
    finally:
        if was_enabled:
            gc.enable()
