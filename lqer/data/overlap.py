"""Whether a model is evaluated on text that it was calibrated on, found in the tokens themselves.

Names and row ranges cannot tell: two files may hold the same documents. Runs of tokens that occur in both texts do,
wherever they begin.
"""

from __future__ import annotations

import numpy as np

# Long enough that only copies share it: two or three sentences.
RUN_TOKENS = 64
# The base of a polynomial hash modulo 2^64: odd, so that every token counts.
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)


def shared_tokens(seen: np.ndarray, other: np.ndarray) -> int:
    """How many tokens of `seen` lie in runs of 64 that `other` holds too; both are one-dimensional token ids.

    `seen` is cut every 64 tokens, `other` is searched at every offset.
    """
    runs = np.sort(_hashes(seen[: len(seen) // RUN_TOKENS * RUN_TOKENS])[::RUN_TOKENS])
    if not len(runs):
        return 0
    # Each of the many is looked up among the few: sorting all of them would take seconds for millions of tokens.
    others = _hashes(other)
    nearest = runs[np.searchsorted(runs, others).clip(max=len(runs) - 1)]
    return RUN_TOKENS * int(np.isin(runs, others[nearest == others]).sum())


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of the run that begins at each position, uint64; empty for fewer tokens than a run."""
    count = max(len(tokens) - RUN_TOKENS + 1, 0)
    hashes, ids = np.zeros(count, dtype=np.uint64), tokens.astype(np.uint64) + np.uint64(1)
    for offset in range(RUN_TOKENS):
        hashes = hashes * HASH_BASE + ids[offset : offset + count]
    return hashes
