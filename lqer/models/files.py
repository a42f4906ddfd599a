"""The weight files of a checkpoint in transformers' layout, and their headers: names, shapes and dtypes, no values.

Weights are read from model.safetensors, or from the shards that model.safetensors.index.json names. An index that names
anything but safetensors files inside its own folder is refused: transformers would unpickle a .bin file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
from huggingface_hub import get_safetensors_metadata
from packaging.version import Version
from safetensors import safe_open
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import cached_file

from lqer.errors import LqerError, ModelError

# A memory-mapped file counts as resident as long as one of its tensors exists; earlier versions can only map.
READ_OPTIONS: dict[str, Any] = {"backend": "pread"} if Version(safetensors.__version__) >= Version("0.8") else {}
# Characters of a library's message that are worth showing.
LONGEST_REASON = 300
ADAPTER_NAME = "adapter_config.json"
PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
# transformers would take a folder with such a file for the state of a distributed training run.
DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

# The name of a tensor of a block, up to the block's number; in the name of a dtype, as BF16 or F8_E4M3, its bits.
BLOCK, BITS = re.compile(r"\D*\.\d+\."), re.compile(r"\d+")

# The path of a file of the checkpoint by its name, None if it does not exist.
Find = Callable[[str], Path | None]


@contextmanager
def reported_as(what: str) -> Iterator[None]:
    """Raise a ModelError of one line, "<what>: <reason>", for whatever a library raises on a file it cannot read."""
    try:
        yield
    except (LqerError, MemoryError):
        raise
    except Exception as error:  # each library and each architecture has errors of its own
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"{what}: {kind}{reason}") from error


def finder(path: str, revision: str | None) -> Find:
    """Finds the files of a local folder or, downloading them if necessary, of a hub repository."""

    def find(name: str) -> Path | None:
        if Path(path).is_dir():
            file = Path(path) / name
            return file if file.exists() or file.is_symlink() else None
        try:
            found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError:
            return None
        return None if found is None else Path(found)

    return find


def weight_files(find: Find, name: str) -> list[Path]:
    """The safetensors files that transformers reads for the model `name`.

    Raises ModelError if there are none, one is missing, or the index is damaged or names other files.
    """
    if find(ADAPTER_NAME) is not None:
        raise ModelError(
            f"model: {name} has a LoRA adapter ({ADAPTER_NAME}): merge it into the weights (peft: merge_and_unload), "
            "or remove it"
        )
    single = find(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [_existing(single)]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise ModelError(
            f"model: {name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} (pickles are not read)"
        )
    files = []
    for shard in _shards(index):
        file = find(shard)
        if file is None:
            raise ModelError(f"model: {index} names {shard}, which does not exist")
        files.append(_existing(file))
    return files


def processor_files(find: Find) -> tuple[Path, ...]:
    """The files that say how a wrapper's inputs are made of images or sound; none for a language model."""
    return tuple(file for name in PROCESSOR_FILES if (file := find(name)) is not None)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ModelError(f"model: {file} is {'a link to a missing file' if file.is_symlink() else 'not a file'}")
    return file


def _shards(index: Path) -> list[str]:
    """The names of the files that an index names, sorted."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        names = [PurePosixPath(shard) for shard in sorted(shards)]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model: {index} is damaged ({type(error).__name__}: {error})") from None
    if not names:
        raise ModelError(f"model: {index} names no files")
    for shard in names:
        if shard.suffix != ".safetensors":
            raise ModelError(f"model: {index} names {shard}: only .safetensors files are read, never a pickle")
        if shard.is_absolute() or ".." in shard.parts:
            raise ModelError(f"model: {index} names {shard}, which is outside the model's folder")
    return [str(shard) for shard in names]


@dataclass(frozen=True)
class Header:
    """Shapes and dtypes (as safetensors spells them) of the tensors of one file."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


def read_header(file: Path) -> Header:
    """Raises ModelError if the file is not a whole safetensors file."""
    try:
        with safe_open(file, framework="pt", **READ_OPTIONS) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return Header(
                {name: tuple(tensor.get_shape()) for name, tensor in slices.items()},
                {name: tensor.get_dtype() for name, tensor in slices.items()},
            )
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"model: {file} is damaged or incomplete: {error}") from None


def largest_block(headers: Iterable[Header]) -> int:
    """Bytes of the tensors of the largest decoder block in its files: of codes and scales, where it is stored so.

    Tensors of one block have the same name up to the first number.
    """
    sizes = Counter[str]()
    for header in headers:
        for name in header.shapes:
            if (block := BLOCK.match(name)) is not None:
                sizes[block[0]] += tensor_bytes(header, name)
    return max(sizes.values(), default=0)


def tensor_bytes(header: Header, name: str) -> int:
    """The bytes of a tensor as it is stored."""
    bits = BITS.search(header.dtypes[name])
    return math.prod(header.shapes[name]) * (int(bits[0]) if bits else 8) // 8


def hub_headers(repository: str, revision: str | None) -> list[Header]:
    """The headers of a hub repository's weight files, without downloading the files; raises the hub's errors."""
    metadata = get_safetensors_metadata(repository, revision=revision)
    return [
        Header(
            {name: tuple(tensor.shape) for name, tensor in file.tensors.items()},
            {name: tensor.dtype for name, tensor in file.tensors.items()},
        )
        for file in metadata.files_metadata.values()
    ]
