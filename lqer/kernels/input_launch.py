"""Host side of the kernels that prepare activations, shared by all regimes.

Shapes: M tokens, I in_features, R rank; P marks padding.
"""

from __future__ import annotations

from torch import Tensor

from lqer.kernels import runtime
from lqer.kernels.activations import round_kernel
from lqer.kernels.layout.codes import Layout
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.spec import Spec

ROUNDED_ROWS, ROUNDED_COLUMNS, ROUNDING_WARPS = 16, 256, 4
MAX_RANK_BLOCK = 64
# Arguments of kernels that write tokens (ordered_tokens.py).
NATURAL_ORDER = {"tile_k": 0, "steps": False}


def dense_rows(x_MI: Tensor) -> Tensor:
    """x itself if the elements of a row are adjacent, else a copy; the stride between rows does not matter."""
    return x_MI if x_MI.stride(1) == 1 else x_MI.contiguous()


def rank_block(rank: int) -> int:
    """Ranks of a linear that a program multiplies at once."""
    return min(max(rank, 16), MAX_RANK_BLOCK)


def order_of(spec: Spec) -> dict[str, int | bool]:
    """The order of decoded columns (decode.py, integers/groups_wide.py), as arguments of kernels that write tokens."""
    layout = spec.layout
    return {"tile_k": layout.tile_k if isinstance(layout, Layout) else 0, "steps": isinstance(layout, GroupLayout)}


def round_activations(x_MI: Tensor, spec: Spec, ordered: bool) -> Tensor:
    """x rounded to a layer's activation format; x itself if activations are neither rounded nor ordered.

    ordered: write columns in the order of decoded ones, padded to whole tiles.
    """
    if not spec.rounding.bits and not ordered:
        return x_MI
    m, k = x_MI.shape
    padded = spec.layout.padded_columns
    x_out = x_MI.new_empty(m, padded if ordered else k)
    pdl = runtime.supports_pdl(x_MI)
    round_kernel[-(-m // ROUNDED_ROWS), -(-padded // ROUNDED_COLUMNS)](
        x_MI, x_out, m, k, x_MI.stride(0), padded=padded, **(order_of(spec) if ordered else NATURAL_ORDER),
        BLOCK_K=ROUNDED_COLUMNS, BLOCK_M=ROUNDED_ROWS, rounding=spec.rounding, pdl=pdl,
        num_warps=ROUNDING_WARPS, **runtime.launch_options(pdl),
    )  # fmt: skip
    return x_out
