"""Kernels around the products of experts (products.py): pairs of a token and one of its experts, sorted; their sum.

Pair p is token p // fan with the expert of place p % fan. A tile is up to BLOCK_M pairs of one expert, neighbours in
`order`, which lists the pairs by expert and, of one expert, ascending. Numbers of pairs and tiles depend on the tokens
alone, so kernels are launched for as many tiles as there may be; those that are left over are empty.

    order   int32 [P]           places of no expert come last
    tiles   int32 [3, P]        expert; first place in `order`; the place after its last; of the first `bound` tiles

Shapes: P pairs, E experts, Q pairs of a turn, C counters, I columns of the output.
"""

import triton
import triton.language as tl


@triton.jit
def expert_of(index, places, P, E):
    """The expert of each pair; E for one that is sent to none."""
    ids = tl.load(index + places, mask=places < P, other=-1).to(tl.int32)
    return tl.where((ids >= 0) & (ids < E), ids, E)


@triton.jit
def load_tile(tiles, tile, P):
    """Expert, first place and end of a tile."""
    return tl.load(tiles + tile), tl.load(tiles + P + tile), tl.load(tiles + 2 * P + tile)


# P and what follows from it change from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["P", "bound", "count"])
def route_kernel(
    index,  # [P]: experts; what lies outside of 0 to E - 1 stands for none
    order,
    tiles,
    counters,  # int32 [count], set to zero
    P,
    bound,
    count,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least P
    BLOCK_E: tl.constexpr,  # at least E
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first program sorts, by counting for each pair those before it; the others clear the counters."""
    if tl.program_id(0) > 0:
        place_C = (tl.program_id(0) - 1) * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(counters + place_C, 0, mask=place_C < count)
        return
    places_P, experts_E = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    ids_P = expert_of(index, places_P, P, E)
    rank_P = tl.zeros((BLOCK_P,), tl.int32)
    start_E, size_E = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, P, BLOCK_Q):
        others_Q = first + tl.arange(0, BLOCK_Q)
        # A place after the last pair is after all of them.
        ids_Q = tl.where(others_Q < P, expert_of(index, others_Q, P, E), E + 1)
        same_PQ = (ids_Q[None, :] == ids_P[:, None]) & (others_Q[None, :] < places_P[:, None])
        before_PQ = (ids_Q[None, :] < ids_P[:, None]) | same_PQ
        rank_P += tl.sum(before_PQ.to(tl.int32), axis=1)
        start_E += tl.sum((ids_Q[None, :] < experts_E[:, None]).to(tl.int32), axis=1)
        size_E += tl.sum((ids_Q[None, :] == experts_E[:, None]).to(tl.int32), axis=1)
    tl.store(order + rank_P, places_P, mask=places_P < P)
    tiles_E = tl.where(experts_E < E, tl.cdiv(size_E, BLOCK_M), 0)
    slot_E = tl.cumsum(tiles_E, axis=0) - tiles_E
    for n in range(0, tl.max(tiles_E, axis=0)):
        here_E, begin_E = n < tiles_E, start_E + n * BLOCK_M
        tl.store(tiles + slot_E + n, experts_E, mask=here_E)
        tl.store(tiles + P + slot_E + n, begin_E, mask=here_E)
        tl.store(tiles + 2 * P + slot_E + n, tl.minimum(begin_E + BLOCK_M, start_E + size_E), mask=here_E)
    empty_P = (places_P >= tl.sum(tiles_E, axis=0)) & (places_P < bound)
    for n in tl.static_range(3):
        tl.store(tiles + n * P + places_P, 0, mask=empty_P)


@triton.jit
def combine_kernel(
    pairs,  # [P, I]: outputs of experts
    index,  # [P]
    weights,  # [P]
    y,  # [P / fan, I]
    E,
    N,
    fan: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = the sum of the outputs of a token's experts, each times its weight, in the order of their places."""
    token, columns_I = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y_I = tl.zeros((BLOCK_N,), tl.float32)
    for place in tl.static_range(fan):
        pair = token * fan + place
        expert = tl.load(index + pair).to(tl.int32)
        chosen = (expert >= 0) & (expert < E)
        # What no expert has written may be NaN.
        inside_I = columns_I < tl.where(chosen, N, 0)
        weight = tl.where(chosen, tl.load(weights + pair).to(tl.float32), 0.0)
        y_I += weight * tl.load(pairs + pair.to(tl.int64) * N + columns_I, mask=inside_I, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64) * N + columns_I, y_I.to(y.dtype.element_ty), mask=columns_I < N)
