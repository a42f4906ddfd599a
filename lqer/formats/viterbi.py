"""The best path through a bit-shift trellis, by dynamic programming (Viterbi, 1967).

A state has L bits. Every step shifts k new bits c in at the low end, and the state names the step's value:

    s_p = (s_(p-1) << k | c_p) mod 2^L          value_p = table[s_p]

so s_p has the 2^k predecessors j << (L - k) | s_p >> k, which share their low L - k bits with it (the overlap). The
search minimises the sum of (x_p - table[s_p])² over all paths, x_p² left out:

    best_p[m]  = min_j cost_p[j << (L - k) | m]                           m: the low L - k bits of a state
    cost_p[s]  = best_(p-1)[s >> k] + table[s]² - 2 x_p table[s]

Seen as a matrix [2^k, 2^(L - k)], costs are minimised over the rows; seen as [2^(L - k), 2^k], a row gets one addend.
Only best_p is kept: on the way back, the 2^k costs of the predecessors of one state are computed again.

On a GPU `viterbi_kernel.py` does the same.

Shapes: N sequences, P positions of a sequence, S states, J predecessors of a state, M overlaps, S = J M.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

# Costs of a chunk of sequences, 2 MB: they stay within the cache, and vectors over its sequences are long.
CHUNK_COSTS = 1 << 19
SMALLEST_CHUNK = 16
# The most that a search keeps for the way back, here or on a GPU.
SEARCH_BYTES = 1 << 30


def best_paths(x_NP: Tensor, table_S: Tensor, bits: int, overlap_N: Tensor | None = None) -> Tensor:
    """States of the paths with the least squared error, int64 [N, P].

    x_NP: float32. table_S: float32 or float16. overlap_N: the L - `bits` bits with which a path starts, before its
    first step, and ends; None leaves both free. Of equally good predecessors the lowest is taken.
    """
    table_S = table_S.to(torch.float32)
    states_NP = torch.empty(x_NP.shape, dtype=torch.int64, device=x_NP.device)
    threads = torch.get_num_threads() if x_NP.device.type == "cpu" else 1
    kept_bytes = 4 * CHUNK_COSTS * x_NP.shape[1] >> bits
    workers = max(min(threads, len(x_NP) // SMALLEST_CHUNK, SEARCH_BYTES // max(kept_bytes, 1)), 1)
    largest = max(CHUNK_COSTS // len(table_S), SMALLEST_CHUNK)
    chunk = max(min(-(-len(x_NP) // workers), largest), 1)

    def search(start: int) -> None:
        now = slice(start, start + chunk)
        states_NP[now] = _best_paths(x_NP[now], table_S, bits, None if overlap_N is None else overlap_N[now])

    # Each operation takes microseconds: threads work on chunks of their own, not together on one operation.
    with _one_thread_per_operation(threads), ThreadPoolExecutor(workers) as pool:
        list(pool.map(search, range(0, len(x_NP), chunk)))
    return states_NP


@contextmanager
def _one_thread_per_operation(threads: int) -> Iterator[None]:
    """Within it, torch's operations run in the thread that calls them; after it in `threads` again."""
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _best_paths(x_NP: Tensor, table_S: Tensor, bits: int, overlap_N: Tensor | None) -> Tensor:
    sequences, positions = x_NP.shape
    predecessors = 1 << bits
    overlaps = len(table_S) // predecessors
    # table[s]² - 2 x table[s] as a product of [S, 2] and [2, N].
    table_S2 = torch.stack([table_S.square(), -2 * table_S], dim=1)
    x_P2N = torch.stack([torch.ones_like(x_NP.T), x_NP.T], dim=1)
    first_MN = x_NP.new_zeros(overlaps, sequences)
    if overlap_N is not None:
        first_MN.fill_(torch.inf).scatter_(0, overlap_N.unsqueeze(0), 0.0)

    best_PMN = x_NP.new_empty(positions, overlaps, sequences)
    cost_SN = x_NP.new_empty(len(table_S), sequences)
    for p in range(positions):
        torch.mm(table_S2, x_P2N[p], out=cost_SN)
        before_MN = best_PMN[p - 1] if p else first_MN
        cost_SN.view(overlaps, predecessors, -1).add_(before_MN.unsqueeze(1))
        torch.amin(cost_SN.view(predecessors, overlaps, -1), dim=0, out=best_PMN[p])

    states_PN = torch.empty(positions, sequences, dtype=torch.int64, device=x_NP.device)
    end_N = best_PMN[-1].argmin(0) if overlap_N is None else overlap_N
    step_J1 = torch.arange(predecessors, device=x_NP.device).unsqueeze(1) * overlaps
    for p in reversed(range(positions)):
        from_JN = step_J1 + end_N
        before_MN = best_PMN[p - 1] if p else first_MN
        value_JN = table_S[from_JN]
        cost_JN = before_MN.gather(0, from_JN >> bits) + value_JN * (value_JN - 2 * x_NP[:, p])
        states_PN[p] = from_JN.gather(0, cost_JN.argmin(0, keepdim=True)).squeeze(0)
        end_N = states_PN[p] >> bits
    return states_PN.T.contiguous()
