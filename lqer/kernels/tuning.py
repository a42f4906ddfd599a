"""Launch parameters for a layer and a number of tokens, from a table of measurements; nothing is tuned during a call.

`experiments/tune_kernels.py` writes `table.json`, the fastest measured launches of one GPU. There are three regimes:

    gemv         one token, MXINT4 weights, rounded activations: integer products (gemv.py)
    gemm         few tokens: weights decoded in registers (gemm.py); a launch per code width, N, K and bucket of M
    dequantize   many tokens, for which the table has no launch: the weight is dequantized, and a library multiplies

A shape that is not in the table uses the launch of the nearest shape, by log N and log K.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).with_name("table.json")
# A bucket holds up to so many tokens; more tokens than in the last one are the dequantize regime.
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
    """A row of the table: the measured shape and its launch (None: dequantize)."""

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
    """The launch for up to `bucket` tokens and codes of `width` bits; None: dequantize."""
    launch = _nearest(("gemm", width, bucket), n, k)
    assert not isinstance(launch, GemvLaunch)
    return launch


@lru_cache(maxsize=4096)
def group_launch(rows: int, strips: int, m: int, multiprocessors: int) -> GemmLaunch:
    """The launch for m tokens and integer groups: the splits with which programs take the shortest time."""
    block_n, block_m = 64, next((size for size in (8, 16) if m <= size), 32)
    tiles = -(-rows // block_n) * -(-m // block_m)

    def time(splits: int) -> float:
        return -(-tiles * splits // multiprocessors) * (-(-strips // splits) + 1)

    enough = [splits for splits in range(1, strips + 1) if tiles * splits >= 3 * multiprocessors] or [strips]
    return GemmLaunch(block_n, block_m, min(enough, key=time), stages=3, warps=4)


def bucket_of(m: int) -> int | None:
    """The bucket of m tokens, None for more than the last."""
    return next((top for top in BUCKETS if m <= top), None)


def _nearest(key: tuple[object, ...], n: int, k: int) -> GemmLaunch | GemvLaunch | None:
    def distance(entry: Entry) -> float:
        return abs(math.log(entry.n / n)) + abs(math.log(entry.k / k))

    return min(read_table()[key], key=distance).launch
