"""Cutting pieces out of quantized matrices, and joining them, without changing a value.

A piece is a run of rows (dim 0) or of columns (dim 1). Across the axis that blocks run along, it may begin and end
where no code is shared (trellis tiles, groups of a codebook); along that axis, where no block is. Scales that a whole
row or tensor shares go with every piece.

Shapes: R rows across the axis, L length of the axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lqer.formats.base import NumberFormat, QuantizedTensor
from lqer.formats.codebook import Codebook

# Parts of a codebook format that all rows have in common, and those with an element for each group of rows.
COMMON_TO_ROWS = {"codebook_basis", "scale_offsets", "scale_steps"}
OF_ROW_GROUPS = {"codebooks", "codebook_scales"}


def cut(tensor: QuantizedTensor, dim: int, start: int, count: int) -> QuantizedTensor:
    """The rows (dim 0) or columns (dim 1) from `start` on, `count` of them, of a matrix.

    Raises ValueError, with the rule, where the piece would share a block, a tile or a codebook with its neighbours.
    """
    size = tensor.shape[dim]
    if start < 0 or not 0 < count <= size - start:
        raise ValueError(f"{start}:{start + count} is not a part of 0:{size}")
    if count == size:
        return tensor
    unit, name = _unit(tensor, dim)
    for edge in (start, start + count):
        if edge % unit and edge != size:
            raise ValueError(f"{edge} is not a multiple of {name} {unit}")
    across = dim != tensor.axis
    pieces = {
        part: _slice(values, 0 if across else -1, start, count, size)
        if _is_divided(tensor.format, part, across)
        else values
        for part, values in tensor.parts.items()
    }
    if isinstance(tensor.format, Codebook) and not across:
        pieces |= {part: _slice(tensor.parts[part], 1, start, count, size) for part in OF_ROW_GROUPS & pieces.keys()}
    shape = tuple(count if one == dim else length for one, length in enumerate(tensor.shape))
    piece = QuantizedTensor(tensor.format, shape, tensor.axis, pieces)
    if isinstance(tensor.format, Codebook) and _groups(piece) != _groups(tensor):
        raise ValueError(f"its codebooks are shared by {_groups(tensor)} weights, those of a piece by {_groups(piece)}")
    return piece


def join(pieces: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """The matrix whose rows (dim 0) or columns (dim 1) are those of the pieces, one after another.

    Raises ValueError for pieces of different formats or axes, for a scale or a codebook that belongs to a whole tensor,
    and along the axis where a piece does not end with a whole block, or rows have scales of their own.
    """
    first = pieces[0]
    if any((piece.format, piece.axis) != (first.format, first.axis) for piece in pieces):
        raise ValueError("the formats of the pieces differ")
    number_format, across = first.format, dim != first.axis
    if number_format.block_size == "tensor" or isinstance(number_format, Codebook):
        raise ValueError(f'a tensor in "{number_format.kind}" has scales or codebooks of its own')
    if not across:
        if number_format.block_size == "row" and len(first.parts) > 1:
            raise ValueError("a row of each piece has a scale of its own")
        unit, name = _unit(first, dim)
        for piece in pieces[:-1]:
            if piece.shape[dim] % unit:
                raise ValueError(f"{piece.shape[dim]} is not a multiple of {name} {unit}")
    parts = {part: torch.cat([piece.parts[part] for piece in pieces], 0 if across else -1) for part in first.parts}
    total = sum(piece.shape[dim] for piece in pieces)
    shape = tuple(total if one == dim else length for one, length in enumerate(first.shape))
    return QuantizedTensor(number_format, shape, first.axis, parts)


def without_first(tensor: QuantizedTensor, dim: int, count: int) -> QuantizedTensor:
    """A matrix without its first `count` rows (dim 0) or columns (dim 1); no value changes.

    Along its block axis they must be whole blocks: `unsupported_cut` tells. Raises ValueError otherwise.
    """
    if dim == tensor.axis and (unsupported_reason := unsupported_cut(tensor.format, count)) is not None:
        raise ValueError(unsupported_reason)
    return cut(tensor, dim, count, tensor.shape[dim] - count)


def unsupported_cut(number_format: NumberFormat, count: int) -> str | None:
    """Why the first `count` values along the block axis cannot be cut off; None if they can."""
    if not number_format.stream_widths and number_format.block_size == "row":
        return None
    if isinstance(number_format.block_size, str):
        return f'a scale is shared by all of them ("{number_format.kind}")'
    if count % number_format.block_size:
        return f"{count} is not a multiple of block_size {number_format.block_size}"
    return None


def _groups(tensor: QuantizedTensor) -> tuple[int, int]:
    """Rows and columns, counted across and along the axis, that a codebook serves."""
    assert isinstance(tensor.format, Codebook)
    layout = tensor.format.layout(tensor.shape[1 - tensor.axis], tensor.shape[tensor.axis])
    return layout.group_rows, layout.group_columns


def _unit(tensor: QuantizedTensor, dim: int) -> tuple[int, str]:
    """What a piece must begin and end with a multiple of, and its name."""
    number_format, across = tensor.format, dim != tensor.axis
    if isinstance(number_format, Codebook):
        rows, columns = _groups(tensor)
        return (rows, "the rows of a codebook") if across else (columns, "the columns of a codebook")
    if across:
        return number_format.vector_rows, "the rows of a tile"
    if isinstance(number_format.block_size, str):
        return number_format.vector_size, "the values of a code"
    return number_format.block_size, "block_size"


def _is_divided(number_format: NumberFormat, part: str, across: bool) -> bool:
    """Whether a piece has its own share of a part: along dim 0 of the part `across` the axis, else along its last."""
    if part == "codes":
        return True
    if isinstance(number_format, Codebook):
        return part not in COMMON_TO_ROWS if across else part not in OF_ROW_GROUPS | {"codebook_basis"}
    return number_format.block_size != "tensor" if across else not isinstance(number_format.block_size, str)


def _slice(values: Tensor, dim: int, start: int, count: int, size: int) -> Tensor:
    """The share of `count` of `size` rows or columns in a part that may have fewer or more elements of them."""
    elements = values.shape[dim]
    end = elements if start + count == size else (start + count) * elements // size
    begin = start * elements // size
    return values.narrow(dim, begin, end - begin).contiguous()
