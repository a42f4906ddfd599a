"""Host side of the kernels for experts: pairs are sorted; gate and up; down; the sum of a token's experts.

Nothing synchronizes with the device, and shapes depend on the number of tokens alone. A launch of many tokens differs
from one of few only in the tile of pairs that it decodes weights for.

Shapes: T tokens, K experts of a token, P = T K pairs, E experts, I in_features, O out_features, F outputs of up, H
halves, R rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from lqer.kernels import runtime
from lqer.kernels.experts.packed import PackedExperts
from lqer.kernels.experts.products import experts_kernel
from lqer.kernels.experts.routing import combine_kernel, route_kernel
from lqer.kernels.input_launch import dense_rows, rank_block, round_activations
from lqer.kernels.integers.launch import PROJECTION_COLUMNS, register_limit, whole_strips
from lqer.kernels.layout.codes import ROW_PADDING, Layout
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.spec import ActivationRounding, Spec
from lqer.kernels.tuning import GemmLaunch, experts_launch

# Sorted by counting in one program; more are sorted by a library.
MOST_COUNTED_PAIRS = 1024
COUNTED_AT_ONCE, COUNTING_WARPS = 16, 8
CLEARED_COUNTERS = 4096
PROJECTING = 8  # programs of Q(x A), for a multiprocessor
COMBINED_COLUMNS, COMBINING_WARPS = 512, 4


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """Every tile but the last of an expert is full."""
    return min(pairs, experts + pairs // block_m)


def pairs_of_tile(pairs: int, up: Spec, down: Spec, experts: int) -> int:
    """BLOCK_M of both launches: an expert with one and a half times the mean number of pairs still has one tile."""
    grouped = [isinstance(spec.layout, GroupLayout) for spec in (up, down)]
    sizes = [size for size in (8, 16, 32, 64) if (size > 8 or all(grouped)) and (size < 64 or not any(grouped))]
    return next((size for size in sizes if size >= 1.5 * pairs / experts), sizes[-1])


def route(index_TK: Tensor, experts: int, block_m: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order` and `tiles` of routing.py, and so many counters, int32, of zero."""
    pairs = index_TK.numel()
    if pairs > MOST_COUNTED_PAIRS:
        order_P, tiles_3P = sorted_pairs(index_TK, experts, block_m)
        return order_P, tiles_3P, order_P.new_zeros(counters)
    order_P, tiles_3P, cleared = (
        torch.empty(shape, dtype=torch.int32, device=index_TK.device) for shape in ((pairs,), (3, pairs), (counters,))
    )
    block_p = max(16, triton.next_power_of_2(pairs))
    route_kernel[(1 + triton.cdiv(counters, CLEARED_COUNTERS),)](
        index_TK, order_P, tiles_3P, cleared, pairs, most_tiles(pairs, experts, block_m), counters, experts,
        BLOCK_M=block_m, BLOCK_P=block_p, BLOCK_E=max(16, triton.next_power_of_2(experts)), BLOCK_Q=COUNTED_AT_ONCE,
        BLOCK_C=CLEARED_COUNTERS, num_warps=COUNTING_WARPS,
    )  # fmt: skip
    return order_P, tiles_3P, cleared


def sorted_pairs(index_TK: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """`order` and `tiles` of routing.py by a library."""
    chosen_P = index_TK.flatten().to(torch.int32)
    chosen_P = torch.where((chosen_P >= 0) & (chosen_P < experts), chosen_P, experts)
    sorted_P, order_P = chosen_P.sort(stable=True)
    everyone = torch.arange(experts + 1, dtype=torch.int32, device=chosen_P.device)
    start = torch.searchsorted(sorted_P, everyone)
    tiles_E = (start.diff() + block_m - 1) // block_m
    end_E = tiles_E.cumsum(0)
    tile_P = torch.arange(len(chosen_P), device=chosen_P.device)
    expert_P = torch.searchsorted(end_E, tile_P, right=True).clamp(max=experts - 1)
    first_P = start[expert_P] + (tile_P - (end_E - tiles_E)[expert_P]) * block_m
    last_P = torch.minimum(first_P + block_m, start[expert_P + 1])
    # Beyond the last tile a tile begins where it ends.
    first_P = torch.minimum(first_P, last_P)
    return order_P.to(torch.int32), torch.stack([expert_P, first_P, last_P]).to(torch.int32)


def run_up(
    x_TI: Tensor, index_TK: Tensor, up: PackedExperts, down: Spec, gate: str, launch: GemmLaunch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What down reads of each pair, Q(act(gate) * up), or, without a gate, its halves [P, H, F]; `order` and `tiles`.

    Q rounds to the activations of down. Rows of pairs that are sent to no expert are not written. launch: by default
    that of the rules; one for `run_down` must have the same block_m.
    """
    pairs, rows, rounding = index_TK.numel(), up.spec.layout.rows, down.rounding if gate else ActivationRounding()
    block_m = pairs_of_tile(pairs, up.spec, down, up.experts)
    launch = _fitting(launch or _launch(index_TK, up, block_m), up, rounding)
    bound = most_tiles(pairs, up.experts, launch.block_m)
    order_P, tiles_3P, counters = route(index_TK, up.experts, launch.block_m, _counters(up, bound, launch))
    x_TI = _as_read(round_activations(dense_rows(x_TI), up.spec, ordered=False), up.spec)
    y = x_TI.new_empty(up.outputs(pairs, down, gate))
    if gate and y.shape[1] > rows:
        y.zero_()
    _run(x_TI, index_TK.shape[1], order_P, tiles_3P, counters, up, gate, rounding, launch, y)
    return y, order_P, tiles_3P


def run_down(
    hidden: Tensor,
    order_P: Tensor,
    tiles_3P: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    down: PackedExperts,
    up: Spec,
    is_ready: bool,
    launch: GemmLaunch | None = None,
) -> Tensor:
    """y [T, O] in the dtype of `hidden`: the outputs of a token's experts times its weights.

    hidden: [P, I] of `run_up` with a gate if `is_ready`, else anybody's, not rounded.
    """
    (tokens, fan), rows, pairs = index_TK.shape, down.spec.layout.rows, index_TK.numel()
    block_m = pairs_of_tile(pairs, up, down.spec, down.experts)
    launch = _fitting(launch or _launch(index_TK, down, block_m), down, ActivationRounding())
    bound = most_tiles(pairs, down.experts, launch.block_m)
    # Nothing is counted where programs wait for no other.
    counted = launch.splits > 1 or down.spec.rank
    counters = order_P.new_zeros(_counters(down, bound, launch)) if counted else order_P
    if not is_ready:
        hidden = _as_read(round_activations(dense_rows(hidden), down.spec, ordered=False), down.spec)
    pairs_PO = hidden.new_empty(pairs, rows)
    _run(hidden, 1, order_P, tiles_3P, counters, down, "", ActivationRounding(), launch, pairs_PO)
    y_TO = hidden.new_empty(tokens, rows)
    combine_kernel[tokens, triton.cdiv(rows, COMBINED_COLUMNS)](
        pairs_PO, index_TK, weights_TK, y_TO, down.experts, rows, fan=fan, BLOCK_N=COMBINED_COLUMNS,
        num_warps=COMBINING_WARPS,
    )  # fmt: skip
    return y_TO


def _as_read(x: Tensor, spec: Spec) -> Tensor:
    return whole_strips(x, spec.layout) if isinstance(spec.layout, GroupLayout) else x


def _launch(index_TK: Tensor, packed: PackedExperts, block_m: int) -> GemmLaunch:
    layout = packed.spec.layout
    assert isinstance(layout, Layout | GroupLayout)
    tiles = min(index_TK.numel(), packed.experts)
    return experts_launch(layout, packed.halves, tiles, block_m, runtime.multiprocessors(index_TK.device))


def _fitting(launch: GemmLaunch, packed: PackedExperts, rounding: ActivationRounding) -> GemmLaunch:
    """The launch with at most one split for each step along K, and whole blocks of outputs that are rounded."""
    spec, layout, block_n = packed.spec, packed.spec.layout, launch.block_n
    if isinstance(layout, Layout) and layout.padded_rows % block_n:
        block_n = ROW_PADDING
    rounded = [rounding, *([spec.rounding] if spec.rank else [])]
    block_n = max([block_n, *(each.block for each in rounded if each.bits)])
    assert isinstance(layout, Layout | GroupLayout)
    steps = layout.strips if isinstance(layout, GroupLayout) else layout.tiles
    return replace(launch, block_n=block_n, splits=min(launch.splits, steps))


def _output_counters(experts: PackedExperts, bound: int, launch: GemmLaunch) -> int:
    """Counters of output tiles, in whole 16 bytes: what follows is aligned for every number of tokens."""
    layout = experts.spec.layout
    assert isinstance(layout, Layout | GroupLayout)
    tiles_n = triton.cdiv(layout.padded_rows, launch.block_n)
    return triton.cdiv(bound * experts.halves * tiles_n, 4) * 4


def _counters(experts: PackedExperts, bound: int, launch: GemmLaunch) -> int:
    rank = experts.spec.rank
    of_branch = bound * experts.halves * (1 + rank // rank_block(rank)) if rank else 0
    return _output_counters(experts, bound, launch) + of_branch


def projection_columns(programs: int, columns: int, x: Tensor) -> int:
    """Of x, for one program of Q(x A): `programs` would take all columns each, and too many small ones take long."""
    split = PROJECTION_COLUMNS
    while split < columns and programs * triton.cdiv(columns, split) > PROJECTING * runtime.multiprocessors(x.device):
        split *= 2
    return split


def _run(
    x: Tensor,
    fan: int,
    order_P: Tensor,
    tiles_3P: Tensor,
    counters: Tensor,
    packed: PackedExperts,
    gate: str,
    rounding: ActivationRounding,
    launch: GemmLaunch,
    y: Tensor,
) -> None:
    """One launch; arguments as of `experts_kernel`."""
    spec, layout, halves, pairs = packed.spec, packed.spec.layout, packed.halves, len(order_P)
    rank, rows, bound = spec.rank, layout.rows, most_tiles(pairs, packed.experts, launch.block_m)
    assert isinstance(layout, Layout | GroupLayout)
    tiles_n = triton.cdiv(layout.padded_rows, launch.block_n)
    meet = launch.splits > 1 or gate
    partial = x.new_empty((halves * launch.splits, rows, pairs), dtype=torch.float32) if meet else None
    splits, columns, projection, projection_partial, of_branch = 0, 0, None, None, None
    if rank:
        of_branch = counters[_output_counters(packed, bound, launch) :]
        columns = projection_columns(
            min(pairs, packed.experts) * halves * (rank // rank_block(rank)), layout.columns, x
        )
        splits = triton.cdiv(layout.columns, columns)
        projection = x.new_empty(halves, pairs, rank)
        projection_partial = x.new_empty((splits, halves, pairs, rank), dtype=torch.float32)
    producers = bound * halves * (rank // rank_block(rank)) * splits
    strides = [0 if part is None else part.stride(1) for part in map(packed.tensors.get, ("words", "high", "scales"))]
    experts_kernel[(producers + bound * halves * launch.splits * tiles_n,)](
        x, order_P, tiles_3P, *packed.tensors.values(), partial, counters, projection_partial, projection, of_branch, y,
        bound, pairs, rows, layout.columns, x.stride(0), y.stride(0), *strides, fan=fan, halves=halves, gate=gate,
        rank=rank, layout=layout.compiled, rounding=spec.rounding, y_rounding=rounding,
        not_rounding=ActivationRounding(), a_block=spec.a_block, b_block=spec.b_block,
        padded_columns=layout.padded_columns, projection_splits=splits, SPLIT_K=columns, tiles_n=tiles_n,
        BLOCK_N=launch.block_n, BLOCK_M=launch.block_m, BLOCK_R=rank_block(rank), splits=launch.splits,
        stages=launch.stages, num_warps=launch.warps, **register_limit(launch, layout),
    )  # fmt: skip
