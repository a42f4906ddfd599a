"""The block Krylov space of M = E H Eᵀ: its orthonormal basis, and M projected onto it.

Shapes: I in_features, O out_features, L block width, D dimension of the space so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lqer.lowrank.metric import Metric

# Random vectors of about length 1 are added to every new vector of the space, scaled by this fraction of the longest
# one, and at least by the second number: they complete a block that has fewer independent vectors than rows. Well above
# the square root of float64's precision, which a Gram matrix can resolve.
FILLING, LEAST_FILLING = 1e-4, 1e-30
# On a GPU: blocks from one space that is looked at to the next.
BLOCKS_AT_ONCE = 2


@lru_cache(maxsize=4)
def start_vectors(width: int, out_features: int, seed: int, device: torch.device) -> Tensor:
    """Random vectors (L, O), the same on every device; drawn once for linears of equal shape."""
    return torch.randn(width, out_features, generator=torch.Generator().manual_seed(seed)).to(device)


def grow(error_OI: Tensor, metric: Metric, start_LO: Tensor, basis_DO: Tensor, images_DI: Tensor) -> Iterator[Tensor]:
    """Fill an orthonormal basis of the space and its images Eᵀ v block by block; yields the projected matrix's rows.

    start_LO: the first block before it is made orthonormal. basis_DO: float64. images_DI: float32, as the error.
    """
    width, out_features = start_LO.shape
    filling_LO, target_LO = start_LO.to(torch.float64) / out_features**0.5, start_LO
    for size in range(width, len(basis_DO) + 1, width):
        here = slice(size - width, size)
        basis_DO[here] = orthonormal(target_LO, filling_LO.roll(size, dims=1), basis_DO[: size - width])
        torch.mm(basis_DO[here].to(torch.float32), error_OI, out=images_DI[here])
        weighted_LI = metric.times(images_DI[here].T).T
        yield weighted_LI @ images_DI[:size].T
        target_LO = weighted_LI @ error_OI.T


def looked_at(width: int, largest: int, rank: int, at_once: int) -> list[int]:
    """The dimensions of the spaces that are looked at, which have room for `rank` vectors; the last is the largest.

    at_once: blocks from one to the next.
    """
    first = max(-(-rank // width), at_once) * width
    return [*range(first, largest, at_once * width), largest]


def projected(rows: Iterator[Tensor], sizes: Sequence[int], ahead: int) -> Iterator[Tensor]:
    """The projected matrix, float64 on the CPU, of each space of these dimensions, from the rows that each block adds.

    ahead: below this dimension the blocks of the next space are asked for before a space is given, so that a GPU works
    on them meanwhile.
    """
    projected_DD, size = torch.empty(0, 0, dtype=torch.float64), 0
    arriving = deque[Callable[[], Tensor]]()
    for here, after in zip(sizes, (*sizes[1:], sizes[-1]), strict=True):
        while size < (after if here < ahead else here):
            rows_LD = next(rows)
            size = rows_LD.shape[1]
            arriving.append(_on_its_way(rows_LD))
        while len(projected_DD) < here:
            projected_DD = _bordered(projected_DD, arriving.popleft()())
        yield projected_DD


def _on_its_way(rows_LD: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; the function that is returned waits for it."""
    if not rows_LD.is_cuda:
        return lambda: rows_LD
    copy_LD = rows_LD.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(rows_LD.device).record_event()

    def arrived() -> Tensor:
        copied.synchronize()
        return copy_LD

    return arrived


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


def orthonormal(block_LO: Tensor, filling_LO: Tensor, basis_DO: Tensor) -> Tensor:
    """Orthonormal rows, float64, that span the part of `block_LO` orthogonal to the basis.

    Where that part has fewer dimensions than rows, `filling_LO` completes them. In float64 one projection is enough: it
    leaves far less of the basis than the filling adds. Then the Gram matrix is factored (Cholesky QR): a QR of long
    rows is slow on a GPU. The success of Cholesky is not checked, because that would synchronize with the GPU.
    """
    rows = torch.cat([block_LO, filling_LO]).to(torch.float64)
    new_LO, filling_LO = rows.addmm_(rows @ basis_DO.T, basis_DO, alpha=-1).split(len(block_LO))
    largest = new_LO.norm(dim=1).max()
    filled_LO = torch.addcmul(new_LO, FILLING * largest + LEAST_FILLING, filling_LO)
    lower_LL, _ = torch.linalg.cholesky_ex(filled_LO @ filled_LO.T)
    return torch.linalg.solve_triangular(lower_LL, filled_LO, upper=False)
