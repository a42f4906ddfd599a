"""Paths through a trellis that close to a ring: s_0 follows s_(P-1), so that their k P bits are all there is to store.

The search for the best ring would take 2^(L - k) searches for a path (viterbi.py). Two come close (QTIP, arXiv
2406.11235): one without ends on the sequence rolled by half gives the overlap at the seam, the second one starts and
ends with that overlap.

Shapes: N sequences, P positions of a sequence, S states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.formats.viterbi import best_paths


def best_rings(x_NP: Tensor, table_S: Tensor, bits: int) -> Tensor:
    """Codes of paths that close to a ring, near to the best: uint8 [N, P], the low `bits` bits of each state.

    x_NP: float32. table_S: float32 or float16, the value of each state, S = 2^L. State p is made of the codes p, p - 1,
    .. around the ring.
    """
    search = best_paths
    if x_NP.is_cuda:
        from lqer.formats.viterbi_kernel import best_paths as search
    half = x_NP.shape[1] // 2
    states_NP = search(x_NP.roll(half, dims=1), table_S, bits, None)
    return (search(x_NP, table_S, bits, states_NP[:, half] >> bits) & (1 << bits) - 1).to(torch.uint8)
