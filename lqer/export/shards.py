"""Writes a model as safetensors in transformers' layout, one shard in memory at a time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lqer.errors import ExportError
from lqer.export.source import CONFIG_FILE, Linear, Source
from lqer.store.files import UMASK, fsync, write_json

# The size of a shard that transformers' save_pretrained writes.
SHARD_BYTES = 5 * 10**9


class Shards:
    """The weight files of a folder: `add` tensors in any order, then `close`."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self._folder, self._limit = folder, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes, self._total_bytes = 0, 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in tensors, and write a shard when it is full. Raises ExportError for a name that was added before."""
        for name, tensor in tensors.items():
            if name in self._names:
                raise ExportError(f"two tensors of this checkpoint would be called {name}")
            self._names.add(name)
            size = tensor.numel() * tensor.element_size()
            if self._waiting and self._waiting_bytes + size > self._limit:
                self._write()
            self._waiting[name] = tensor.contiguous()
            self._waiting_bytes += size
            self._total_bytes += size

    def _write(self) -> None:
        write_tensors(self._folder / _part(len(self._shards)), self._waiting)
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, and the index where there are several files."""
        self._write()
        count = len(self._shards)
        if count == 1:
            (self._folder / _part(0)).rename(self._folder / SAFE_WEIGHTS_NAME)
            return
        files = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        for index, file in enumerate(files):
            (self._folder / _part(index)).rename(self._folder / file)
        weight_map = {name: file for file, names in zip(files, self._shards) for name in names}
        index_file = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._folder / SAFE_WEIGHTS_INDEX_NAME, index_file)


def write_linears(
    source: Source, folder: Path, tensors_of: Callable[[Linear], Mapping[str, Tensor]], described: Mapping[str, Any]
) -> None:
    """Write a model whose quantized linears each have tensors of their own, and all else as the checkpoint has it.

    tensors_of: those of a linear's weight, by what follows its name in theirs. described: the entry of config.json that
    says what they are.
    """
    shards = Shards(folder)
    for linears, others in source.read():
        for linear in linears:
            named = {f"{linear.name}.{part}": tensor for part, tensor in tensors_of(linear).items()}
            shards.add(named | linear.biases)
        shards.add(others)
    shards.close()
    write_json(folder / CONFIG_FILE, {**source.config, **described})
    source.copy_surroundings(folder)


def _part(index: int) -> str:
    return f"part-{index:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, sorted by name, on disk when this returns."""
    try:
        save_file({name: tensors[name] for name in sorted(tensors)}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library wraps the system's refusal of a write, such as that of a full disk.
        raise OSError(errno.EIO, str(error), str(path)) from error
    # safetensors creates files for their owner alone.
    path.chmod(0o666 & ~UMASK)
    fsync(path)
