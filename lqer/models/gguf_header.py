"""Checks a GGUF file's header before a library reads it: counts, lengths and offsets must be within the file.

Libraries believe the header: one that lies makes them allocate without limit or raise whatever occurs. Blocks beyond
the announced number are refused, because the loader would drop them. The layout is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import re
import struct
from math import prod
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from lqer.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bytes of a metadata value by its type; strings and arrays have none.
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = b"general.alignment"
COUNT_SUFFIX = b".block_count"
BLOCK_NAME = re.compile(r"blk\.(\d+)\.")
# Smallest sizes: a metadata entry is a name's length, a type and a byte; a tensor has two integers more.
ENTRY_BYTES, TENSOR_BYTES = 13, 24


def check_gguf(file: Path) -> None:
    """Raise ModelError, naming the entry, unless every entry and every tensor lies within the file."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
    except OSError as error:
        raise ModelError(f"model: {file} cannot be read: {error.strerror or error}") from None
    except (ValueError, struct.error) as error:
        raise ModelError(f"model: {file} is not a whole GGUF file: {error}") from None


class _Header:
    """A cursor over the bytes of a header; raises ValueError wherever it would leave the file."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0
        self._alignment = DEFAULT_ALIGNMENT
        self._blocks: int | None = None

    def check(self) -> None:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._integer(4)
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not one of {VERSIONS}")
        tensors, entries = self._integer(8), self._integer(8)
        if tensors * TENSOR_BYTES + entries * ENTRY_BYTES > len(self._data):
            raise ValueError(f"its header declares {tensors} tensors and {entries} entries, more than the file holds")
        for _ in range(entries):
            self._entry()
        extents = [self._tensor() for _ in range(tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        for name, offset, size in extents:
            block = BLOCK_NAME.match(name)
            if block and self._blocks is not None and int(block[1]) >= self._blocks:
                raise ValueError(f"it declares {self._blocks} blocks, and its model does not use {name}")
            if start + offset + size > len(self._data):
                raise ValueError(f"tensor {name} ends at byte {start + offset + size} of {len(self._data)}")

    def _take(self, count: int) -> bytes:
        self._skip(count)
        return self._data[self._at - count : self._at]

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise ValueError(f"it ends after {len(self._data)} bytes, within its header")
        self._at += count

    def _integer(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _entry(self) -> None:
        name, kind = self._take(self._integer(8)), self._integer(4)
        before = self._at
        self._value(kind)
        if name.endswith(COUNT_SUFFIX):
            self._blocks = int.from_bytes(self._data[before : self._at], "little")
        if name == ALIGNMENT_KEY:
            self._alignment = max(int.from_bytes(self._data[before : self._at], "little"), 1)

    def _value(self, kind: int) -> None:
        if kind in VALUE_BYTES:
            self._skip(VALUE_BYTES[kind])
        elif kind == STRING:
            self._skip(self._integer(8))
        elif kind == ARRAY:
            element, count = self._integer(4), self._integer(8)
            if element in VALUE_BYTES:
                self._skip(count * VALUE_BYTES[element])
            elif element == STRING:
                # Each has a length of its own, so a count that lies soon leaves the file.
                for _ in range(count):
                    self._skip(self._integer(8))
            else:
                raise ValueError(f"an array of values of type {element}")
        else:
            raise ValueError(f"a value of type {kind}")

    def _tensor(self) -> tuple[str, int, int]:
        """Name, offset and size in bytes."""
        name = self._take(self._integer(8)).decode("utf-8", "replace")
        dimensions = self._integer(4)
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        elements = prod(self._integer(8) for _ in range(dimensions))
        kind, offset = self._integer(4), self._integer(8)
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"tensor {name} is of type {kind}")
        values, size = GGML_QUANT_SIZES[kind]  # type: ignore[index]  # an IntEnum's values are its keys
        return name, offset, elements // values * size
