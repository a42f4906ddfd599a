"""How a layer is launched for how many tokens, read from a table; nothing is tuned in a user's call.

`table.json` holds the fastest measured launches of one GPU; `experiments/tune_kernels.py` makes it again. There are
three regimes:

    gemv     one token, MXINT4 weights, rounded activations: integer products (gemv.py)
    gemm     few tokens: weights decoded in registers (gemm.py), one launch per code width, N, K and bucket of M
    expand   many tokens, where the table has no launch: weights decoded to memory once, then a library's product

A shape that is not in the table takes the launch of the nearest one, by N and K.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).with_name("table.json")
# A bucket serves M up to its number; beyond the last one, weights are decoded to memory.
BUCKETS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class GemmLaunch:
    block_n: int
    block_m: int
    splits: int
    stages: int
    warps: int


@dataclass(frozen=True)
class GemvLaunch:
    block_n: int
    block_t: int  # K tiles at once
    warps: int


@dataclass(frozen=True)
class Entry:
    """A row of the table: the shape it was measured on, and the launch (None: expand)."""

    n: int
    k: int
    launch: GemmLaunch | GemvLaunch | None


@lru_cache
def read_table(path: Path = TABLE) -> dict[tuple[object, ...], tuple[Entry, ...]]:
    """Entries by ("gemv",) or ("gemm", width, bucket)."""
    table: dict[tuple[object, ...], list[Entry]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["launches"]:
        if row["kernel"] == "gemv":
            table.setdefault(("gemv",), []).append(Entry(row["n"], row["k"], GemvLaunch(**row["launch"])))
        else:
            launch = GemmLaunch(**row["launch"]) if row["launch"] else None
            table.setdefault(("gemm", row["width"], row["m"]), []).append(Entry(row["n"], row["k"], launch))
    return {key: tuple(entries) for key, entries in table.items()}


@lru_cache(maxsize=1024)
def gemv_launch(n: int, k: int) -> GemvLaunch:
    launch = _nearest(("gemv",), n, k)
    assert isinstance(launch, GemvLaunch)
    return launch


@lru_cache(maxsize=4096)
def gemm_launch(width: int, n: int, k: int, bucket: int) -> GemmLaunch | None:
    """The launch for up to `bucket` tokens on codes of `width` bits; None where weights are decoded to memory."""
    launch = _nearest(("gemm", width, bucket), n, k)
    assert not isinstance(launch, GemvLaunch)
    return launch


def bucket_of(m: int) -> int | None:
    """The bucket that serves m tokens, None beyond the last."""
    return next((top for top in BUCKETS if m <= top), None)


def _nearest(key: tuple[object, ...], n: int, k: int) -> GemmLaunch | GemvLaunch | None:
    def distance(entry: Entry) -> float:
        return abs(math.log(entry.n / n)) + abs(math.log(entry.k / k))

    return min(read_table()[key], key=distance).launch
