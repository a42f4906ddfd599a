"""Tensors in memory up to a budget, in files beyond it: hidden states on their way, a block's statistics.

A tensor on disk is an ordinary CPU tensor over a shared mapping of a file that has no name any more, so that nothing is
left behind however a process ends. Its pages count as resident while they are in use: `release_pages` unmaps
them, and the kernel writes them out and drops them when it needs the memory.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNITS = {"": 1, "B": 1}
UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """4000000000, "4GB", "3.5 GiB" -> bytes. Raises ValueError for anything else."""
    match = SIZE.fullmatch(str(size).strip()) if type(size) in (int, str) else None
    if match is None or match[2].upper() not in UNITS:
        raise ValueError('must be bytes or a size such as "4GB" or "512MiB"')
    return int(float(match[1]) * UNITS[match[2].upper()])


class Offload:
    """Allocates CPU tensors; those that would exceed `max_bytes` together are kept in files under `folder`.

    max_bytes None: everything in memory. A tensor's bytes are free again once nothing refers to it.
    """

    def __init__(self, max_bytes: int | None = None, folder: Path | None = None):
        self._max_bytes, self._folder = max_bytes, folder
        self._resident = 0
        # By address of their first byte: a tensor cannot be looked up in a dictionary by identity.
        self._mapped: dict[int, mmap.mmap] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process gets: the same budget, none of it used."""
        return Offload, (self._max_bytes, self._folder)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A tensor of undefined content. pinned: page-locked where it is in memory, for copies from and to a GPU.

        Raises OSError if the disk has no room for it.
        """
        size = math.prod(shape) * dtype.itemsize
        if self._exceeds(size):
            return self._on_disk(shape, dtype, size)
        return self._in_memory(torch.empty(*shape, dtype=dtype, pin_memory=pinned))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """A tensor of zeros; on a device other than the CPU it is an ordinary one, outside the budget."""
        if device is not None and device.type != "cpu":
            return torch.zeros(*shape, dtype=dtype, device=device)
        return self.empty(shape, dtype).zero_()

    def kept(self, tensor: Tensor) -> Tensor:
        """The tensor itself where it fits into the budget, or is on another device than the CPU; else a copy on disk.

        Raises OSError if the disk has no room for it.
        """
        if tensor.device.type != "cpu":
            return tensor
        if not self._exceeds(tensor.nbytes):
            return self._in_memory(tensor)
        return self._on_disk(tensor.shape, tensor.dtype, tensor.nbytes).copy_(tensor)

    def release_pages(self) -> None:
        """Unmap the pages of every tensor on disk; their content is kept and mapped again at the next access."""
        for mapping in self._mapped.values():
            mapping.madvise(mmap.MADV_DONTNEED)

    def _exceeds(self, size: int) -> bool:
        return size > 0 and self._max_bytes is not None and self._resident + size > self._max_bytes

    def _in_memory(self, tensor: Tensor) -> Tensor:
        """Count the tensor as long as there is one."""
        self._resident += tensor.nbytes
        weakref.finalize(tensor, self._free, tensor.nbytes)
        return tensor

    def _on_disk(self, shape: Sequence[int], dtype: torch.dtype, size: int) -> Tensor:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            try:
                # Room is claimed now: a mapping without it would kill the process at its first write.
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, f"{size} bytes under {self._folder}") from None
            mapping = mmap.mmap(file.fileno(), size)
        tensor = torch.frombuffer(mapping, dtype=dtype).view(*shape)
        address = tensor.data_ptr()
        self._mapped[address] = mapping
        weakref.finalize(tensor, self._mapped.pop, address, None)
        return tensor

    def _free(self, size: int) -> None:
        self._resident -= size
