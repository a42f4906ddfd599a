"""Eigenvalues of the projected matrices of a growing Krylov space (krylov.py), computed on the CPU.

Where the space grows on the CPU too, eigenvalues are computed after every block, and eigenvectors once, of the last
space. A GPU grows a block in a fifth of the time that a matrix of 192 rows takes on the CPU, and takes no less for it
itself: threads decompose the matrices of the last few spaces while the next ones grow.

Shapes: L block width, D dimension of the space so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

# Spaces that a GPU grows beyond the one whose eigenvalues are waited for.
SPACES_AHEAD = 3

# The rows (L, D) that a block adds to the projected matrix; a call waits for them.
RowsToCome = Callable[[], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """The projected matrix of a space, float64 on the CPU, its eigenvalues, ascending, and its eigenvectors."""

    projected_DD: Tensor
    values: Callable[[], Tensor]
    eigenvectors: Callable[[], tuple[Tensor, Tensor]]


def spectra_in_turn(blocks: Iterator[RowsToCome]) -> Iterator[Spectrum]:
    """Of one space after another, each once the one before it did not do."""
    projected_DD = torch.empty(0, 0, dtype=torch.float64)
    for rows_LD in blocks:
        projected_DD = _bordered(projected_DD, rows_LD())
        yield Spectrum(
            projected_DD, partial(torch.linalg.eigvalsh, projected_DD), partial(torch.linalg.eigh, projected_DD)
        )


def spectra_in_threads(blocks: Iterator[RowsToCome]) -> Iterator[Spectrum]:
    """The same, decomposed by threads while the next spaces grow."""
    rows: list[RowsToCome] = []
    waiting: deque[Future[Spectrum]] = deque()
    try:
        for rows_LD in blocks:
            rows.append(rows_LD)
            waiting.append(_threads().submit(_decomposed, tuple(rows)))
            if len(waiting) > SPACES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for unwanted in waiting:
            unwanted.cancel()


def _decomposed(rows: Sequence[RowsToCome]) -> Spectrum:
    """Waits for the GPU."""
    projected_DD = torch.empty(0, 0, dtype=torch.float64)
    for rows_LD in rows:
        projected_DD = _bordered(projected_DD, rows_LD())
    found = torch.linalg.eigh(projected_DD)
    return Spectrum(projected_DD, lambda: found[0], lambda: (found[0], found[1]))


@lru_cache
def _threads() -> ThreadPoolExecutor:
    """Each of them with one thread for the routine that it calls."""
    return ThreadPoolExecutor(SPACES_AHEAD + 1, "krylov", initializer=torch.set_num_threads, initargs=(1,))


def sent_to_cpu(x: Tensor) -> RowsToCome:
    """A function that waits for `x` alone, not for what the GPU has been given to do since, and returns it."""
    if not x.is_cuda:
        return lambda: x
    on_cpu = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return on_cpu

    return wait


def _bordered(projected_DD: Tensor, rows_LD: Tensor) -> Tensor:
    """The projected matrix of a space that has grown by the last L columns of `rows_LD`, symmetric."""
    rows_LD = rows_LD.to(torch.float64)
    size, width = len(projected_DD), len(rows_LD)
    grown_DD = torch.empty(size + width, size + width, dtype=torch.float64)
    grown_DD[:size, :size] = projected_DD
    grown_DD[size:] = rows_LD
    grown_DD[:size, size:] = rows_LD[:, :size].T
    corner_LL = rows_LD[:, size:]
    grown_DD[size:, size:] = (corner_LL + corner_LL.T) / 2
    return grown_DD
