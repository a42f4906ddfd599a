"""Reads tensors of a checkpoint, those of a block when they are needed: a block of 256 experts takes tens of GB.

Of a stack of experts one expert at a time is read, so that what is held does not depend on how experts are stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lqer.models.coded import Encoded, Scheme
from lqer.models.files import READ_OPTIONS
from lqer.models.structure import KEPT_IN_FLOAT32
from lqer.nn.stacked import Piece

# Threads that fill page-locked memory.
READING_THREADS = 4
# A safetensors file begins with the length of its header, JSON, behind which the tensors lie.
LENGTH_BYTES = 8
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
# A block of at most READ_WHOLE_BYTES is read whole, while another is used; a larger one is read READ_AT_ONCE_BYTES at a
# time. A dense model of 70 billion parameters has blocks of 1.7 GB, DeepSeek-V3 of 11.6 GB in FP8.
READ_WHOLE_BYTES = 1 << 32
READ_AT_ONCE_BYTES = 1 << 29


@dataclass(frozen=True)
class Place:
    """A stored tensor. expert: the only one to be read of a stack; None for all that there is."""

    file: Path
    name: str
    expert: int | None = None


@dataclass(frozen=True)
class StoredTensor:
    """The place of a parameter's values: transposed in GPT-2's Conv1D, a piece of an expert's.

    piece: of a stack, of which its expert alone is read, or of a matrix, which is read whole. nbytes: as stored.
    scales: the place of the scales of codes.
    """

    place: Place
    nbytes: int
    transposed: bool = False
    piece: Piece | None = None
    scheme: Scheme | None = None
    scales: Place | None = None

    def values(self, stored: Tensor, scales: Tensor | None) -> Tensor | Encoded:
        piece = self.piece
        if piece is not None and self.place.expert is not None:
            piece = replace(piece, expert=0)
        if self.scheme is not None and scales is not None:
            return Encoded(self.scheme, stored, scales, piece)
        if piece is not None:
            return piece.of(stored).clone(memory_format=torch.contiguous_format)
        return stored.T.contiguous() if self.transposed else stored


class StoredTensors(Mapping[str, Tensor | Encoded]):
    """The tensors of a block by name, on the CPU, read when they are asked for; none is held after that.

    pinned: in page-locked memory. ahead: whether those of a block that is not too large are read now.
    """

    def __init__(self, wanted: Mapping[str, StoredTensor], pinned: bool = False, ahead: bool = False):
        self._wanted = dict(sorted(wanted.items()))
        self._pinned = pinned
        self._held: dict[str, Tensor | Encoded] = {}
        self._at: dict[Place, list[str]] = {}
        for name, stored in self._wanted.items():
            self._at.setdefault(stored.place, []).append(name)
        if ahead and self._bytes(self._wanted) <= READ_WHOLE_BYTES:
            self._read(self._wanted)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)

    def __contains__(self, name: object) -> bool:
        return name in self._wanted

    def __getitem__(self, name: str) -> Tensor | Encoded:
        if name not in self._held:
            self._read(self._at[self._wanted[name].place])
        return self._held.pop(name)

    def pop(self, name: str) -> Tensor | Encoded:
        """The tensor, for the last time; where it is not held, the next ones in the order of names are read with it."""
        if name not in self._held:
            self._read(self._following(name))
        stored = self._wanted.pop(name)
        self._at[stored.place].remove(name)
        return self._held.pop(name)

    def _following(self, first: str) -> list[str]:
        """The tensor and those behind it, as many as are read at once; all of one place together."""
        found: dict[str, None] = {}
        size = 0
        for name in dropwhile(first.__ne__, self._wanted):
            stored = self._wanted[name]
            size += stored.nbytes * (name not in found)
            if found and size > READ_AT_ONCE_BYTES:
                break
            found |= dict.fromkeys(self._at[stored.place])
        return [name for name in found if name not in self._held]

    def _bytes(self, names: Iterable[str]) -> int:
        return sum({stored.place: stored.nbytes for stored in map(self._wanted.__getitem__, names)}.values())

    def _read(self, names: Iterable[str]) -> None:
        self._held |= read_tensors({name: self._wanted[name] for name in names}, self._pinned)


class StoredBlock(Mapping[str, Tensor]):
    """The parameters and buffers that a block of a skeleton would be filled with, each read when it is asked for.

    dtype: of floating-point ones, as in `fill_parameters`. They are on the device.
    """

    def __init__(self, block: nn.Module, tensors: StoredTensors, device: torch.device, dtype: torch.dtype):
        self._block, self._tensors, self._device, self._dtype = block, tensors, device, dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return parameter_value(self._block, name, self._tensors[name], self._device, self._dtype)


def parameter_value(
    module: nn.Module, name: str, stored: Tensor | Encoded, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The value of a module's parameter or buffer: decoded on the device, floating-point ones in `dtype`.

    Those that transformers keeps in float32 are in that (lqer/models/structure.py).
    """
    owner, _, leaf = name.rpartition(".")
    wanted = torch.float32 if leaf in getattr(module.get_submodule(owner), KEPT_IN_FLOAT32, ()) else dtype
    tensor = stored.to(device, non_blocking=True)
    if isinstance(tensor, Encoded):
        return tensor.decode(wanted)
    return tensor.to(wanted) if tensor.is_floating_point() else tensor


def fill_parameters(
    module: nn.Module, tensors: dict[str, Any] | StoredTensors, device: torch.device, dtype: torch.dtype
) -> None:
    """Set parameters and buffers of `module` by name, see `parameter_value`; empties `tensors`."""
    for key in sorted(tensors):
        tensor = parameter_value(module, key, tensors.pop(key), device, dtype)
        owner_name, _, leaf = key.rpartition(".")
        owner = module.get_submodule(owner_name)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)


def read_tensors(wanted: Mapping[str, StoredTensor], pinned: bool = False) -> dict[str, Tensor | Encoded]:
    """The stored tensors, on the CPU; no file stays open or mapped. pinned: in page-locked memory."""
    # Scales may be in another file than their codes.
    scales = {stored.scales for stored in wanted.values() if stored.scales is not None}
    found = _read_places({stored.place for stored in wanted.values()} | scales, pinned)
    return {
        name: stored.values(found[stored.place], None if stored.scales is None else found[stored.scales])
        for name, stored in wanted.items()
    }


def _read_places(places: Collection[Place], pinned: bool) -> dict[Place, Tensor]:
    files: dict[Path, list[Place]] = {}
    for place in sorted(places, key=lambda place: (place.file, place.name, place.expert or 0)):
        files.setdefault(place.file, []).append(place)
    return {place: tensor for file, here in files.items() for place, tensor in _read_some(file, here, pinned).items()}


def read_file(file: Path, pinned: bool = False) -> dict[str, Tensor]:
    """The tensors of one safetensors file by name, on the CPU; the file does not stay open or mapped."""
    with safe_open(file, framework="pt", **READ_OPTIONS) as opened:
        names = list(opened.keys())
    found = _read_some(file, [Place(file, name) for name in names], pinned)
    return {place.name: tensor for place, tensor in found.items()}


def _read_some(file: Path, places: Collection[Place], pinned: bool) -> dict[Place, Tensor]:
    # Opened by the library in any case, which refuses a file that is not whole.
    with safe_open(file, framework="pt", **READ_OPTIONS) as opened:

        def read(place: Place) -> Tensor:
            if place.expert is None:
                tensor = opened.get_tensor(place.name)
            else:
                tensor = opened.get_slice(place.name)[place.expert : place.expert + 1]
            return tensor if READ_OPTIONS else tensor.clone()

        return read_in_place(file, places, pinned=True) if pinned else {place: read(place) for place in places}


def read_in_place(file: Path, places: Collection[Place], pinned: bool) -> dict[Place, Tensor]:
    """Tensors of a whole safetensors file, each read straight into its memory, by several threads.

    Page-locked memory is used again and again: a tensor on the way would be made of fresh pages, which take several
    times as long as the bytes.
    """
    with file.open("rb", buffering=0) as opened, ThreadPoolExecutor(READING_THREADS, "read") as threads:
        header_bytes = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        header = json.loads(opened.read(header_bytes))

        def read(place: Place) -> Tensor:
            entry = header[place.name]
            if (dtype := TORCH_DTYPES.get(entry["dtype"])) is None:
                raise SafetensorError(f"{place.name} has the dtype {entry['dtype']}, which is not known")
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            if place.expert is not None:
                size = (end - begin) // shape[0]
                shape, begin = [1, *shape[1:]], begin + place.expert * size
            tensor = torch.empty(shape, dtype=dtype, pin_memory=pinned)
            into = tensor.reshape(-1).view(torch.uint8).numpy().data
            at = LENGTH_BYTES + header_bytes + begin
            while len(into):
                if not (done := os.preadv(opened.fileno(), [into], at)):
                    raise SafetensorError(f"{place.name} ends early")
                into, at = into[done:], at + done
            return tensor

        return dict(zip(places, threads.map(read, places), strict=True))
