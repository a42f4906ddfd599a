"""The search of `viterbi.py` on a GPU: one program per sequence goes forward, one thread per sequence goes back.

With a state s = j << (L - k) | q << k | c, of which j is shifted out and c was shifted in, a step is

    best'[q, c] = min_j best[j, q] + v (v - 2 x),  v = table[j, q, c]            choice[q, c] = that j

Each thread holds a few q with all c, so it reads 2^k entries of `best` for 4^k states, from a buffer that stays in the
L1 cache, as does the table. The 2^k choices of a step are kept for the way back, a byte for each overlap (q, c). It
imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: N sequences, P positions of a sequence, S states, M overlaps (q, c).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.formats.viterbi import SEARCH_BYTES

# Sequences of a program that goes back: a warp.
BACKWARD_SEQUENCES = 32
# A thread takes one entry q at a time; where there are more than threads, a program makes rounds.
LEAST_WARPS, MOST_WARPS = 4, 16


def best_paths(x_NP: Tensor, table_S: Tensor, bits: int, overlap_N: Tensor | None = None) -> Tensor:
    """States of the paths with the least squared error, int64 [N, P], as `viterbi.best_paths` finds them.

    x_NP: float32. table_S: float32, or float16, of which more fits into the cache. overlap_N: the overlap at both ends,
    or None.
    """
    sequences, positions = x_NP.shape
    overlaps = len(table_S) >> bits
    entries = overlaps >> bits
    warps = min(max(entries // 32, LEAST_WARPS), MOST_WARPS)
    x_NP, table_S = x_NP.contiguous(), table_S.contiguous()
    states_NP = torch.empty(sequences, positions, dtype=torch.int64, device=x_NP.device)
    chunk = max(SEARCH_BYTES // (positions * overlaps), 1)
    choices_NPM = torch.empty(min(chunk, sequences), positions, overlaps, dtype=torch.uint8, device=x_NP.device)
    best_N2M = torch.empty(min(chunk, sequences), 2, overlaps, dtype=torch.float32, device=x_NP.device)
    for first in range(0, sequences, chunk):
        x, states = x_NP[first : first + chunk], states_NP[first : first + chunk]
        # Where both ends are free, the forward kernel writes the ends that it finds.
        ends_N = overlap_N[first : first + chunk].contiguous() if overlap_N is not None else states[:, 0].clone()
        viterbi_forward_kernel[(len(x),)](
            x, table_S, best_N2M, choices_NPM, ends_N, positions, CLOSED=overlap_N is not None, CODES=1 << bits,
            ENTRIES=entries, BLOCK=min(entries, 32 * warps), num_warps=warps,
        )  # fmt: skip
        viterbi_backward_kernel[(triton.cdiv(len(x), BACKWARD_SEQUENCES),)](
            choices_NPM, ends_N, states, len(x), positions, overlaps, BITS=bits, BLOCK=BACKWARD_SEQUENCES, num_warps=1
        )
    return states_NP


@triton.jit
def viterbi_forward_kernel(
    x, table, best, choices, ends, positions,
    CLOSED: tl.constexpr, CODES: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    overlaps: tl.constexpr = CODES * ENTRIES
    q = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, CODES)[None, :]
    x += n * positions
    best += n * 2 * overlaps
    choices += n * positions * overlaps
    for first in tl.range(0, ENTRIES, BLOCK):
        start = tl.zeros((BLOCK, CODES), tl.float32)
        if CLOSED:
            start = tl.where((first + q) * CODES + c == tl.load(ends + n), 0.0, float("inf"))
        tl.store(best + (first + q) * CODES + c, start)
    for p in range(positions):
        before = best + (p % 2) * overlaps
        after = best + (1 - p % 2) * overlaps
        twice_x = 2 * tl.load(x + p)
        # All of the last step is written before any of it is read; two buffers, so that one barrier is enough.
        tl.debug_barrier()
        for block in tl.range(0, ENTRIES, BLOCK):
            m = (block + q) * CODES + c
            value = tl.load(table + m).to(tl.float32)
            least = tl.load(before + block + q) + value * (value - twice_x)
            choice = tl.zeros((BLOCK, CODES), tl.int32)
            for j in tl.static_range(1, CODES):
                value = tl.load(table + j * overlaps + m).to(tl.float32)
                cost = tl.load(before + j * ENTRIES + block + q) + value * (value - twice_x)
                choice = tl.where(cost < least, j, choice)
                least = tl.minimum(cost, least)
            tl.store(after + m, least)
            tl.store(choices + p * overlaps + m, choice.to(tl.uint8))
    if not CLOSED:
        tl.debug_barrier()
        every = tl.arange(0, overlaps)
        tl.store(ends + n, tl.argmin(tl.load(best + (positions % 2) * overlaps + every), axis=0).to(tl.int64))


@triton.jit
def viterbi_backward_kernel(
    choices, ends, states, sequences, positions, overlaps, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = n < sequences
    m = tl.load(ends + n, mask=inside, other=0)
    for i in range(positions):
        at = n * positions + (positions - 1 - i)
        j = tl.load(choices + at * overlaps + m, mask=inside, other=0).to(tl.int64)
        state = j * overlaps + m
        tl.store(states + at, state, mask=inside)
        m = state >> BITS
