"""Chunks of a model's decoder blocks: `--chunk 2/4` is the second of four, counted from 1."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lqer.errors import ConfigError


@dataclass(frozen=True)
class Chunk:
    """The `index`-th of `count` chunks, counted from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def blocks(self, total: int) -> range:
        """The contiguous blocks of this chunk; sizes differ by at most one, and a chunk may be empty."""
        return range((self.index - 1) * total // self.count, self.index * total // self.count)


def parse_chunk(text: str) -> Chunk:
    """Chunk(2, 4) from "2/4". Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None:
        raise ConfigError(f"--chunk: must have the form i/n, such as 2/4; found {text[:40]!r}")
    chunk = Chunk(int(match[1]), int(match[2]))
    if not 1 <= chunk.index <= chunk.count:
        raise ConfigError(f"--chunk: i must be between 1 and n; found {text!r}")
    return chunk
