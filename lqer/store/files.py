"""Atomic writes, and hashes of files and values."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

# It can only be read by setting it, which other threads would notice.
UMASK = os.umask(0)
os.umask(UMASK)
# Of its name, what a file's name may hold.
HOST = re.sub(r"[^\w.-]", "", socket.gethostname())[:40]
# A few threads are worth their start for a file of this size.
LARGE_BYTES = 1 << 24
# It stays in a processor's cache, and has few pages that are made anew for each file.
CHUNK_BYTES = 1 << 22
# A pool of a hash's own: a process that is forked after the library's pool was used would wait for it for ever.
HASHING_THREADS = 8


def hash_file(path: Path) -> str:
    """BLAKE3 (hex) of a file's bytes, of a large file's by several threads: faster than most disks.

    It is read, not mapped: pages of a mapped file would count as this process's memory.
    """
    size = path.stat().st_size
    digest = blake3(max_threads=HASHING_THREADS if size > LARGE_BYTES else 1)
    buffer = memoryview(bytearray(min(CHUNK_BYTES, size + 1)))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def content_hash(value: Any) -> str:
    """sha256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path) -> Path:
    """A hidden name next to `path` that no other process uses, on any host that shares the folder.

    Host and process say whose it is where a kill has left it; two containers may have both in common.
    """
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.{secrets.token_hex(4)}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create a temporary file next to `path`, sync it, and rename it: `path` is never partially written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path, write) as temporary:
        move_into_place(temporary, path)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a file that is on disk already, and sync the folder."""
    temporary.replace(path)
    fsync(path.parent)


@contextmanager
def written_beside(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """The temporary file next to `path` that `write` has created, synced; removed at the end unless it was renamed."""
    temporary = beside(path)
    try:
        write(temporary)
        # Readable to whom the folder is: safetensors creates files for their owner alone.
        temporary.chmod(0o666 & ~UMASK)
        fsync(temporary)
        yield temporary
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) != str(temporary):
            raise
        # Calls on an open file do not say which file it is, and nobody knows the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        # On a broken disk the first error is the one to report.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def json_text(value: Any) -> str:
    """How every JSON file of the project is written: strict JSON, in which a number that is not finite is null."""
    return json.dumps(without_nonfinite(value), indent=1, allow_nan=False) + "\n"


def without_nonfinite(value: Any) -> Any:
    """The value with None for every float that is NaN or infinite, which JSON has no way to write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(entry) for entry in value]
    return value


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))
