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
trusted alone. The values of a small projected matrix are computed on the CPU, which is faster, while the GPU works on
the blocks of the next space, which may turn out not to be needed; from EIGENVECTORS_ON_GPU rows on, the GPU finds the
vectors too in little more time, and the last space has no second eigenproblem. Launches are recorded
(`lqer/lowrank/krylov_graphs.py`).

Shapes: I in_features, O out_features, R rank, L block width, D dimension of the space so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lqer.lowrank.krylov_graphs import growing_space
from lqer.lowrank.krylov_space import BLOCKS_AT_ONCE, looked_at, projected
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
# Rows of a projected matrix (module docstring).
EIGENVECTORS_ON_GPU = 200


@dataclass(frozen=True)
class KrylovSolution:
    """a_IR and b_RO, float32; singular_values_R, float64, descending; gap: estimated (optimum − captured) / optimum."""

    a_IR: Tensor
    b_RO: Tensor
    singular_values_R: Tensor
    gap: float


def block_width(rank: int) -> int:
    """The vectors of a block: half the rank, at least NARROWEST, in units of WIDTH_UNIT."""
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
    """The solution, or None where a block of that width may have missed copies of a repeated eigenvalue.

    at_once: blocks from one space that is looked at to the next.
    """
    out_features = error_OI.shape[0]
    tolerance = LOSS_TOLERANCE if metric.hessian_II is None else FULL_METRIC_LOSS_TOLERANCE
    largest = min(MOST_BLOCKS, out_features // width) * width
    convergence = _Convergence(trusted=1 if at_once > 1 else 2)
    space = growing_space(error_OI, metric, width, largest, seed)
    sizes = looked_at(width, largest, rank, at_once)
    for projected_DD in projected(space.rows, sizes, ahead=EIGENVECTORS_ON_GPU if error_OI.is_cuda else 0):
        ritz_D, vectors_DD = _ritz(projected_DD, error_OI.device)
        convergence.add(float(ritz_D[-rank:].sum()))
        # A random orthonormal block is an unbiased sample of M's trace.
        energy = float(projected_DD[:width, :width].trace()) * out_features / width
        if convergence.is_enough(energy, tolerance):
            break
    if vectors_DD is None:
        ritz_D, vectors_DD = _ritz_vectors(projected_DD, error_OI.device)
    ritz_R, vectors_DR = ritz_D.flip(0)[:rank].clamp(min=0), vectors_DD.flip(1)[:, :rank]
    if _may_lack_copies(ritz_R, width):
        return None
    size = len(projected_DD)
    factors = _factors(ritz_R, vectors_DR, space.basis_DO[:size], space.images_DI[:size])
    return KrylovSolution(*factors, convergence.gap)


def _ritz(projected_DD: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ritz values, ascending, on the CPU, and their vectors where a GPU finds both as fast as a CPU the values."""
    if device.type == "cuda" and len(projected_DD) >= EIGENVECTORS_ON_GPU:
        return _ritz_vectors(projected_DD, device)
    return torch.linalg.eigvalsh(projected_DD), None


def _ritz_vectors(projected_DD: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, on the CPU, and their vectors on the device."""
    ritz_D, vectors_DD = torch.linalg.eigh(projected_DD.to(device))
    return ritz_D.cpu(), vectors_DD


def _factors(ritz_R: Tensor, vectors_DR: Tensor, basis_DO: Tensor, images_DI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_IR, b_RO and the singular values."""
    noise = torch.finfo(torch.float32).eps * ritz_R[0]
    roots_R = ritz_R.sqrt()
    inverse_R = torch.where(ritz_R > noise, 1 / roots_R, 0.0)
    sigma_R, inverse_R = torch.stack([roots_R, inverse_R]).to(vectors_DR.device)
    a_IR = images_DI.T @ (vectors_DR * inverse_R).to(images_DI)
    b_RO = (vectors_DR * sigma_R).T.to(basis_DO) @ basis_DO
    return a_IR, b_RO.to(torch.float32), sigma_R


def _may_lack_copies(ritz_R: Tensor, width: int) -> bool:
    """Whether one of the values has as many copies as a block holds, and one more would displace a smaller value."""
    noise = torch.finfo(torch.float32).eps * ritz_R[0]
    first, last = ritz_R[:-width], ritz_R[width - 1 : -1]
    return bool(((first - last <= COPIES_DIFFER * first) & (first > noise)).any())


def _limit(before: float, last: float, now: float) -> float:
    """The limit of the energies captured after three steps."""
    gained, gained_before = now - last, last - before
    if gained <= 0:
        return now
    ratio = min(gained / max(gained_before, gained), SLOWEST_CONVERGENCE)
    return now + gained * ratio / (1 - ratio)
