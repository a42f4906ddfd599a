"""Progress bars of an evaluation, which the caller, or the user with TQDM_DISABLE, may hide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tqdm.auto import tqdm


def progress_bar(shown: bool) -> Callable[..., tqdm]:
    """tqdm, or tqdm that shows nothing. `disable=False` is never passed: it would override TQDM_DISABLE."""
    return tqdm if shown else partial(tqdm, disable=True)
