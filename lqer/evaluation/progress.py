"""Progress bars of an evaluation, which its caller may hide, and so may the user by TQDM_DISABLE."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tqdm.auto import tqdm


def progress_bar(shown: bool) -> Callable[..., tqdm]:
    """tqdm, or tqdm that shows nothing. `disable=False` is never said: it would count for more than TQDM_DISABLE."""
    return tqdm if shown else partial(tqdm, disable=True)
