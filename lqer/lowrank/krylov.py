"""The best low-rank product by a block Krylov method: matrix products only, no square root, no inverse, no SVD.

With E an error (out x in) and H the metric, the reconstruction needs the leading eigenvectors of M = E H Eᵀ (O, O). M
is never formed: v -> E·(H·(Eᵀ·v)) is applied a few times to a block of random vectors Q₀, and the best approximations
in the space spanned by Q₀, M Q₀, M² Q₀, … follow from a small projected matrix (Rayleigh-Ritz; Musco and Musco, arXiv
1504.05477, algorithm 2). With V the Ritz vectors and σ² the Ritz values, A = Eᵀ V σ⁻¹ and B = σ Vᵀ, so A·B = Eᵀ V Vᵀ is
a projection of Eᵀ whatever H is: a singular H or an E of low rank needs no special case.

Blocks are half as wide as the rank: the same energy is captured in a space half as large as with blocks wider than the
rank, with half the products (Meyer, Musco and Musco, arXiv 2305.02535). But a space grown from L vectors holds at most
L copies of a repeated eigenvalue; where that many are found, the iteration restarts with a block that holds all copies
that can matter.

σ² are the energies that the product really captures. How much more the optimum captures is estimated: the energy
captured by the spaces of three steps converges geometrically, and its limit is extrapolated; of the last two limits the
higher one counts, because a cluster of eigenvalues is found in jumps. The iteration ends when the estimate is small,
both relative to the captured energy and relative to the loss: where the optimum itself removes a twentieth of an error,
its last percent is a two-thousandth of the loss.

On a GPU launches and eigenproblems of the small projected matrix take longer than the products. So only every second
space is looked at: its extrapolated limit rests on as many blocks as two limits of neighbouring spaces do, and is
trusted alone. The values of a small projected matrix are computed on the CPU, which is faster; from EIGENVECTORS_ON_GPU
rows on, the GPU finds the vectors too in about that time, and the last space has no second eigenproblem.

Shapes: I in_features, O out_features, R rank, L block width, D dimension of the space so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, reduce

import torch
from torch import Tensor

from lqer.lowrank.metric import Metric
from lqer.lowrank.precision import full_float32

# A block of half the rank, but no narrower than efficient matrix products need, in whole registers.
NARROWEST, WIDTH_UNIT = 24, 8
# Vectors beyond the rank in a block that must hold every copy of a repeated eigenvalue.
OVERSAMPLING = 16
MOST_BLOCKS = 14
# Ritz values whose relative difference is smaller count as copies of one eigenvalue.
COPIES_DIFFER = 1e-2
# Stop once the estimated optimum captures less than this fraction more, and lowers the loss by less than that one.
GAP_TOLERANCE = 2e-2
LOSS_TOLERANCE = 6e-4
# Under a full H, for methods that promise the optimum; its spectrum falls fast, so few steps are needed.
FULL_METRIC_LOSS_TOLERANCE = 1e-6
# The extrapolated gains shrink at least by this factor per step; unbounded, the sum of a stalled series is infinite.
SLOWEST_CONVERGENCE = 0.9
# Random vectors of about length 1 are added to every new vector of the space, scaled by this fraction of the longest
# one, and at least by the second number: they complete a block that has fewer independent vectors than rows. Well above
# the square root of float64's precision, which a Gram matrix can resolve.
FILLING, LEAST_FILLING = 1e-4, 1e-30
# On a GPU: blocks from one space that is looked at to the next, and the rows of a projected matrix (module docstring).
BLOCKS_AT_ONCE, EIGENVECTORS_ON_GPU = 2, 160


@dataclass(frozen=True)
class KrylovSolution:
    """a_IR and b_RO, float32; singular_values_R, float64, descending; gap: estimated (optimum − captured) / optimum."""

    a_IR: Tensor
    b_RO: Tensor
    singular_values_R: Tensor
    gap: float


def block_width(rank: int) -> int:
    return max(NARROWEST, -(-rank // (2 * WIDTH_UNIT)) * WIDTH_UNIT)


def largest_space(rank: int) -> int:
    """Dimensions that a solution of that rank may need: the sides of E must be longer."""
    return block_width(rank) * MOST_BLOCKS


def solve_krylov(error_OI: Tensor, metric: Metric, rank: int, seed: int) -> KrylovSolution:
    """error_OI: float32, largest_space(rank) <= O. The start depends on `seed` alone, on every device."""
    out_features = error_OI.shape[0]
    if largest_space(rank) > out_features:
        raise ValueError(f"rank {rank} needs {largest_space(rank)} rows, the error has {out_features}")
    at_once = BLOCKS_AT_ONCE if error_OI.is_cuda else 1
    with full_float32(), _one_thread() if error_OI.is_cuda else nullcontext():
        narrow = _iterate(error_OI, metric, rank, block_width(rank), seed, at_once)
        if narrow is not None:
            return narrow
        wide = _iterate(error_OI, metric, rank, rank + OVERSAMPLING, seed, at_once)
    assert wide is not None, "a block wider than the rank holds all copies that matter"
    return wide


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is left for the CPU is so small that waking other threads takes longer than the work."""
    chosen = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(chosen)


@dataclass
class _Convergence:
    """The energies captured by one space after another, and the limits extrapolated from each three of them.

    trusted: of how many of the last limits the highest counts.
    """

    trusted: int
    captured: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def add(self, captured: float) -> None:
        self.captured.append(captured)
        if len(self.captured) >= 3:
            self.limits.append(_limit(*self.captured[-3:]))

    @property
    def missed(self) -> float:
        return max(self.limits[-self.trusted :]) - self.captured[-1]

    @property
    def gap(self) -> float:
        return self.missed / (self.captured[-1] + self.missed) if self.captured[-1] > 0 else 0.0

    def is_enough(self, energy: float, loss_tolerance: float) -> bool:
        """Whether both the captured energy and the loss are close to their limits."""
        if len(self.limits) < self.trusted:
            return False
        loss = max(energy - self.captured[-1], 0.0)
        return self.missed <= GAP_TOLERANCE * self.captured[-1] and self.missed <= loss_tolerance * loss


def _iterate(error_OI: Tensor, metric: Metric, rank: int, width: int, seed: int, at_once: int) -> KrylovSolution | None:
    """None where a block of that width may have missed copies of a repeated eigenvalue.

    at_once: blocks from one space that is looked at to the next.
    """
    out_features, in_features = error_OI.shape
    tolerance = LOSS_TOLERANCE if metric.hessian_II is None else FULL_METRIC_LOSS_TOLERANCE
    largest = min(MOST_BLOCKS, out_features // width) * width
    convergence = _Convergence(trusted=1 if at_once > 1 else 2)
    basis_DO = error_OI.new_empty(largest, out_features, dtype=torch.float64)
    images_DI = error_OI.new_empty(largest, in_features)
    projected_DD, new_rows = torch.empty(0, 0, dtype=torch.float64), []
    for rows_LD in _grow(error_OI, metric, width, seed, basis_DO, images_DI):
        new_rows.append(rows_LD)
        size = rows_LD.shape[1]
        if size < rank or (len(new_rows) < at_once and size < largest):
            continue
        projected_DD = reduce(_bordered, [rows.cpu() for rows in new_rows], projected_DD)
        new_rows.clear()
        ritz_D, vectors_DD = _ritz(projected_DD, error_OI.device)
        convergence.add(float(ritz_D[-rank:].sum()))
        # A random orthonormal block is an unbiased sample of M's trace.
        energy = float(projected_DD[:width, :width].trace()) * out_features / width
        if convergence.is_enough(energy, tolerance):
            break
    if vectors_DD is None:
        ritz_D, vectors_DD = torch.linalg.eigh(projected_DD.to(error_OI.device))
    ritz_R, vectors_DR = ritz_D.flip(0)[:rank].clamp(min=0), vectors_DD.flip(1)[:, :rank]
    if _may_lack_copies(ritz_R, width):
        return None
    return KrylovSolution(*_factors(ritz_R, vectors_DR, basis_DO[:size], images_DI[:size]), convergence.gap)


def _ritz(projected_DD: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ritz values, ascending, and their vectors where these take no longer than the values on a CPU."""
    if device.type == "cuda" and len(projected_DD) >= EIGENVECTORS_ON_GPU:
        ritz_D, vectors_DD = torch.linalg.eigh(projected_DD.to(device))
        return ritz_D, vectors_DD
    return torch.linalg.eigvalsh(projected_DD), None


def _grow(
    error_OI: Tensor, metric: Metric, width: int, seed: int, basis_DO: Tensor, images_DI: Tensor
) -> Iterator[Tensor]:
    """Fill an orthonormal basis of the space and its images Eᵀ v block by block; yields the projected matrix's rows."""
    out_features = error_OI.shape[0]
    start_LO = _start(width, out_features, seed, error_OI.device)
    filling_LO, target_LO = start_LO.to(torch.float64) / out_features**0.5, start_LO
    for size in range(width, len(basis_DO) + 1, width):
        here = slice(size - width, size)
        basis_DO[here] = _orthonormal(target_LO, filling_LO.roll(size, dims=1), basis_DO[: size - width])
        torch.mm(basis_DO[here].to(torch.float32), error_OI, out=images_DI[here])
        weighted_LI = metric.times(images_DI[here].T).T
        yield weighted_LI @ images_DI[:size].T
        target_LO = weighted_LI @ error_OI.T


@lru_cache(maxsize=4)
def _start(width: int, out_features: int, seed: int, device: torch.device) -> Tensor:
    """Random vectors (L, O), the same on every device; drawn once for linears of equal shape."""
    return torch.randn(width, out_features, generator=torch.Generator().manual_seed(seed)).to(device)


def _factors(ritz_R: Tensor, vectors_DR: Tensor, basis_DO: Tensor, images_DI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_IR, b_RO and the singular values."""
    sigma_R = ritz_R.sqrt()
    noise = torch.finfo(torch.float32).eps * ritz_R[0]
    inverse_R = torch.where(ritz_R > noise, 1 / sigma_R, 0.0)
    a_IR = images_DI.T @ (vectors_DR * inverse_R).to(images_DI)
    b_RO = (vectors_DR * sigma_R).T.to(basis_DO) @ basis_DO
    return a_IR, b_RO.to(torch.float32), sigma_R.to(basis_DO.device)


def _may_lack_copies(ritz_R: Tensor, width: int) -> bool:
    """Whether one of the values has as many copies as a block holds, and one more would displace a smaller value."""
    noise = torch.finfo(torch.float32).eps * ritz_R[0]
    first, last = ritz_R[:-width], ritz_R[width - 1 : -1]
    return bool(((first - last <= COPIES_DIFFER * first) & (first > noise)).any())


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


def _orthonormal(block_LO: Tensor, filling_LO: Tensor, basis_DO: Tensor) -> Tensor:
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


def _limit(before: float, last: float, now: float) -> float:
    """The limit of the energies captured after three steps."""
    gained, gained_before = now - last, last - before
    if gained <= 0:
        return now
    ratio = min(gained / max(gained_before, gained), SLOWEST_CONVERGENCE)
    return now + gained * ratio / (1 - ratio)
