"""One decoder block to be quantized, and the files of its results.

Where one linear takes long, several processes share a block: each leaves its linears in files of the unfinished
checkpoint, and whoever writes the block takes them from there (lqer/stages/quantize.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lqer.formats import QuantizedTensor
from lqer.models.loaders import OpenedModel
from lqer.models.structure import block_linears
from lqer.stages.alike import units_of
from lqer.store.names import (
    block_file,
    layers_file,
    linears_file,
    linears_prefix,
    linears_rows_file,
    spectra_file,
)
from lqer.store.workspace import Workspace

# Prefixes of the names of tensors, since one file holds both kinds.
PACKED, SPECTRA = "packed:", "spectra:"

# Bytes per weight whose spectra are to be found: it and its rounded value, in float32. The most that a GPU holds.
SPECTRA_BYTES, MOST_SPECTRA_BYTES = 8, 1 << 32
# Finds singular values, by the names that they are stored under.
Spectra = Callable[[], Mapping[str, Tensor]]


def weight_shapes(block: nn.Module) -> dict[str, torch.Size]:
    """(out_features, in_features) of a block's linears by name."""
    return {name: linear.weight.shape for name, linear in block_linears(block).items()}


def blocks_with_spectra(blocks: int) -> set[int]:
    """The blocks whose error spectra the report shows."""
    return {0, blocks // 2, blocks - 1}


@dataclass(frozen=True)
class BlockWork:
    """One decoder block to be quantized.

    linears: the shapes of their weights (O, I). tensors: all its parameters and buffers, which may be read from disk
    each time one is asked for. Both by their names within the block. rounded: weights that have been rounded already,
    by linear; only the low-rank part of their method remains.
    """

    index: int
    name: str
    linears: Mapping[str, torch.Size]
    tensors: Mapping[str, Tensor]
    with_spectra: bool
    rounded: Mapping[str, QuantizedTensor] = field(default_factory=dict)

    @property
    def finds_spectra_later(self) -> bool:
        return bytes_of_later_spectra(sum(shape.numel() for shape in self.linears.values())) > 0

    @classmethod
    def on(cls, opened: OpenedModel, index: int, tensors: Mapping[str, Tensor]) -> BlockWork:
        """A block of original weights."""
        return cls(
            index=index,
            name=f"{opened.name}.{index}",
            linears=weight_shapes(opened.blocks[index]),
            tensors=tensors,
            with_spectra=index in blocks_with_spectra(len(opened.blocks)),
        )

    def full_names(self, linears: Iterable[str]) -> list[str]:
        """The linears' names within the model."""
        return [f"{self.name}.{linear}" for linear in linears]

    def weight(self, full_name: str) -> Tensor:
        """The weight (O, I) of a linear as it is stored."""
        return self.tensors[f"{self._within(full_name)}.weight"].detach()

    def bias(self, full_name: str) -> Tensor | None:
        """The bias (O,) of a linear; None where it has none."""
        bias_O = self.tensors.get(f"{self._within(full_name)}.bias")
        return None if bias_O is None else bias_O.detach()

    def rounded_weight(self, full_name: str) -> QuantizedTensor | None:
        """The weight of a linear that has been rounded already."""
        return self.rounded.get(self._within(full_name))

    def _within(self, full_name: str) -> str:
        return full_name.removeprefix(f"{self.name}.")


def bytes_of_later_spectra(weights: int) -> int:
    """What a GPU holds of a block with that many weights until its spectra are found; 0 where that is at once."""
    size = SPECTRA_BYTES * weights
    return size if size <= MOST_SPECTRA_BYTES else 0


@dataclass(frozen=True)
class QuantizedLinears:
    """What is written of some linears of a block, by full names: packed tensors, the parameters that these replace, the
    rows of layers-*.json, spectra: each a function that finds those of one linear, in whatever thread writes them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    rows: list[dict[str, Any]] = field(default_factory=list)
    spectra: list[Spectra] = field(default_factory=list)

    def add(self, other: QuantizedLinears) -> None:
        """Take in those of other linears of the same block."""
        self.tensors.update(other.tensors)
        self.replaced.update(other.replaced)
        self.rows.extend(other.rows)
        self.spectra.extend(other.spectra)

    def sort(self, full_names: Sequence[str]) -> None:
        """Put the rows into the order of the block, whatever the order in which they came."""
        place = {name: index for index, name in enumerate(full_names)}
        self.rows.sort(key=lambda row: place[row["name"]])


def all_spectra(found: Iterable[Spectra]) -> dict[str, Tensor]:
    """What all of them find, by name: this does the work that was put off."""
    return {name: values for find in found for name, values in find().items()}


def found_already(spectra: Mapping[str, Tensor]) -> list[Spectra]:
    """Spectra that another process has found, in the form of ones still to be found."""
    return [lambda: spectra] if spectra else []


def write_block(workspace: Workspace, work: BlockWork, found: QuantizedLinears) -> dict[str, Tensor]:
    """Write one block's files, and return the tensors, by full names: quantized linears packed, all else as it was."""
    kept = [name for name in work.tensors if f"{work.name}.{name}" not in found.replaced]
    tensors = {f"{work.name}.{name}": work.tensors[name] for name in kept} | found.tensors
    if found.spectra:
        # A GPU takes seconds for them, and can work on the next block beside them.
        workspace.write_found(spectra_file(work.index), partial(all_spectra, found.spectra))
    workspace.write_json(layers_file(work.index), found.rows)
    # Last: its presence marks the block as done.
    workspace.write_tensors(block_file(work.index), tensors)
    return tensors


def write_linears(workspace: Workspace, index: int, unit: str, found: QuantizedLinears) -> None:
    """Leave the linears of one unit of block `index` to whoever writes the block."""
    packed = {f"{PACKED}{name}": tensor for name, tensor in found.tensors.items()}
    spectra = {f"{SPECTRA}{name}": tensor for name, tensor in all_spectra(found.spectra).items()}
    workspace.write_tensors(linears_file(index, unit), packed | spectra)
    # Last: its presence marks them as done.
    workspace.write_json(linears_rows_file(index, unit), {"replaced": sorted(found.replaced), "rows": found.rows})


def units_there(workspace: Workspace, index: int, linears: Iterable[str]) -> list[str]:
    """The units of the linears of block `index` that were left for it."""
    return [unit for unit in units_of(linears) if linears_rows_file(index, unit) in workspace]


def read_linears(workspace: Workspace, index: int, units: Iterable[str]) -> QuantizedLinears:
    """These units of the linears of block `index`, which were left for it."""
    found = QuantizedLinears()
    for unit in units:
        tensors, rows = workspace.tensors(linears_file(index, unit)), workspace.json(linears_rows_file(index, unit))
        packed, spectra = (
            {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in (PACKED, SPECTRA)
        )
        found.add(QuantizedLinears(packed, set(rows["replaced"]), rows["rows"], found_already(spectra)))
    return found


def remove_linears(workspace: Workspace, blocks: Iterable[int]) -> None:
    """Remove what was left for blocks that are written."""
    prefixes = tuple(linears_prefix(index) for index in blocks)
    for name in workspace.names():
        if name.startswith(prefixes):
            workspace.remove(name)
