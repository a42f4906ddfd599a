"""Refit codebooks to the loss of a layer under fixed codes (GPTVQ, arXiv 2402.15319, "codebook update").

With codes and block scales fixed, Q = A(c) is linear in the centroids c, and the loss is a quadratic in them,

    L(c) = tr((W - A(c)) H (W - A(c))ᵀ)        gradient  -2 Aᵀ((W - A(c)) H)

A gives each weight its centroid's element times its block scale; Aᵀ sums over the weights of a centroid. L is a sum
over rows, so every group of rows is a separate problem, and all are solved in one batch.

"cg" is the closed form: conjugate gradients on Aᵀ(A(c) H) = Aᵀ(W H), preconditioned by the diagonal. "adam" is the
paper's method. The result is a proposal: a group of rows accepts it only if its loss falls with int8 centroids.

Codebooks of low rank are factors times a basis, c = F B: F and B are refitted alternately.

Shapes: O out_features, I in_features, G groups of rows, C groups of columns, N = G * C codebooks, K centroids, D
elements of a vector, V vectors, r rank, T parameters of any shape, a separate problem per entry of the first dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import Codebook, QuantizedTensor
from lqer.formats.groups import Layout
from lqer.formats.kmeans import cluster_sums

Update = Literal["cg", "adam", "none"]

CG_ITERATIONS = 25
LOW_RANK_ROUNDS = 3
# GPTVQ's settings: a run that ends above its start is repeated with a tenth of the learning rate.
ADAM_STEPS = 25
ADAM_RATE = 1e-3
ADAM_RUNS = 4
# A loss must fall by more than the accuracy of float32 sums.
LOSS_ACCURACY = 1e-6


def update_codebooks(
    weight_OI: Tensor, hessian_II: Tensor, quantized: QuantizedTensor, update: Update = "cg"
) -> QuantizedTensor:
    """The same codes and block scales with codebooks of lower loss; unchanged where none was found.

    weight_OI: float32, unquantized. hessian_II: E[x xᵀ] up to scale, undamped. quantized: of `weight_OI`, in a
    `Codebook`. update: "cg", "adam", or "none", which returns `quantized` as it is.
    """
    number_format, old = quantized.format, quantized.parts
    assert isinstance(number_format, Codebook)
    if update == "none":
        return quantized
    minimise = {"cg": conjugate_gradients, "adam": adam}[update]
    loss = LayerLoss(weight_OI, hessian_II, quantized)
    if number_format.codebook_rank:
        new = _update_factors(loss, old, minimise)
    else:
        start_GCKD = number_format.decode_centroids(old)
        new = number_format.encode_centroids(minimise(centroid_problem(loss), start_GCKD).flatten(0, 1))
    new |= {name: new[name].reshape(old[name].shape) for name in ("codebooks", "codebook_scales")}
    old_G, new_G = (loss.value(number_format.decode_centroids(parts)) for parts in (old, new))
    if number_format.codebook_rank:  # groups share the basis: all or none
        old_G, new_G = old_G.sum().expand_as(old_G), new_G.sum().expand_as(new_G)
    falls_G = new_G < old_G * (1 - LOSS_ACCURACY)
    chosen = {
        name: torch.where(falls_G[:1, None] if name == "codebook_basis" else _broadcast(falls_G, part), part, old[name])
        for name, part in new.items()
    }
    return replace(quantized, parts=old | chosen)


class LayerLoss:
    """L as a function of centroids [G, C, K, D], for the codes and block scales of a quantized weight."""

    def __init__(self, weight_OI: Tensor, hessian_II: Tensor, quantized: QuantizedTensor):
        number_format = quantized.format
        assert isinstance(number_format, Codebook)
        self.number_format = number_format
        self.dimension, self.count = number_format.dimension, number_format.centroids
        self.weight_OI = weight_OI
        # Up to scale; a mean diagonal of one keeps float32 sums in range.
        mean = hessian_II.diagonal().mean()
        self.hessian_II = (hessian_II / mean.where(mean > 0, 1.0)).to(torch.float32)
        self.layout: Layout = number_format.layout(*weight_OI.shape)
        self.scale_OI = number_format.decode_scales(quantized.parts, weight_OI)
        codes_OV = quantized.parts["codes"].to(torch.int64)
        self.codes_NV = self.layout.group(codes_OV, self.layout.group_columns // self.dimension)
        first_N1 = torch.arange(len(self.codes_NV), device=weight_OI.device).unsqueeze(1) * self.count
        self.index_OV = self.layout.ungroup(self.codes_NV + first_N1, codes_OV.shape[1])

    def value(self, centroids_GCKD: Tensor) -> Tensor:
        """L of each group of rows, float64 [G]."""
        error_OI = self.weight_OI - self.weights(centroids_GCKD)
        loss_O = (error_OI @ self.hessian_II * error_OI).sum(1, dtype=torch.float64)
        missing = self.layout.row_groups * self.layout.group_rows - len(loss_O)
        return pad(loss_O, (0, missing)).view(self.layout.row_groups, -1).sum(1)

    def weights(self, centroids_GCKD: Tensor) -> Tensor:
        """A(c): float32 [O, I]."""
        return centroids_GCKD.reshape(-1, self.dimension)[self.index_OV].flatten(1) * self.scale_OI

    def sums(self, x_OI: Tensor) -> Tensor:
        """Aᵀ(x): [G, C, K, D]."""
        x_NVD = self.layout.group(x_OI * self.scale_OI).unflatten(1, (-1, self.dimension))
        sums_NDK = cluster_sums(x_NVD.mT.contiguous(), self.codes_NV, self.count)
        return sums_NDK.mT.unflatten(0, (self.layout.row_groups, self.layout.column_groups))

    def curvature(self) -> Tensor:
        """The diagonal of Aᵀ A H without the products of two weights of one row: [G, C, K, D]."""
        return self.sums(self.hessian_II.diagonal() * self.scale_OI)


@dataclass(frozen=True)
class Problem:
    """min over theta of L(expand(theta)); expand is linear and contract its adjoint."""

    loss: LayerLoss
    expand: Callable[[Tensor], Tensor]
    contract: Callable[[Tensor], Tensor]
    curvature: Tensor  # of the shape of theta: roughly the diagonal of half the second derivative

    def normal(self, theta_T: Tensor) -> Tensor:
        """Half the second derivative of L applied to theta."""
        weights_OI = self.loss.weights(self.expand(theta_T))
        return self.contract(self.loss.sums(weights_OI @ self.loss.hessian_II))

    def descent(self, theta_T: Tensor) -> Tensor:
        """Minus half the gradient of L."""
        error_OI = self.loss.weight_OI - self.loss.weights(self.expand(theta_T))
        return self.contract(self.loss.sums(error_OI @ self.loss.hessian_II))


def centroid_problem(loss: LayerLoss) -> Problem:
    """L over the centroids [G, C, K, D] themselves."""
    return Problem(loss, lambda theta: theta, lambda sums: sums, loss.curvature())


def factor_problem(loss: LayerLoss, basis_rK: Tensor) -> Problem:
    """L over factors [G, C, r] under a fixed basis."""
    return Problem(
        loss,
        lambda factors_GCr: (factors_GCr @ basis_rK).unsqueeze(-1),
        lambda sums_GCKD: sums_GCKD.squeeze(-1) @ basis_rK.T,
        loss.curvature().squeeze(-1) @ basis_rK.T.square(),
    )


def basis_problem(loss: LayerLoss, factors_GCr: Tensor) -> Problem:
    """L over the basis [1, r, K] that all codebooks share, under fixed factors."""
    return Problem(
        loss,
        lambda basis_1rK: (factors_GCr @ basis_1rK).unsqueeze(-1),
        lambda sums_GCKD: torch.einsum("gcr,gck->rk", factors_GCr, sums_GCKD.squeeze(-1)).unsqueeze(0),
        torch.einsum("gcr,gck->rk", factors_GCr.square(), loss.curvature().squeeze(-1)).unsqueeze(0),
    )


def conjugate_gradients(problem: Problem, theta_T: Tensor, iterations: int = CG_ITERATIONS) -> Tensor:
    """Steps from theta towards the minimum; each entry of the first dim is a separate problem."""
    inverse_T = torch.where(problem.curvature > 0, 1 / problem.curvature, 0.0)  # 0: nothing depends on it
    residual_T = problem.descent(theta_T)
    direction_T = preconditioned_T = inverse_T * residual_T
    energy = _dot(residual_T, preconditioned_T)
    for _ in range(iterations):
        moved_T = problem.normal(direction_T)
        step = _ratio(energy, _dot(direction_T, moved_T))
        theta_T = theta_T + step * direction_T
        residual_T = residual_T - step * moved_T
        preconditioned_T = inverse_T * residual_T
        last_energy, energy = energy, _dot(residual_T, preconditioned_T)
        direction_T = preconditioned_T + _ratio(energy, last_energy) * direction_T
    return theta_T


def adam(problem: Problem, theta_T: Tensor) -> Tensor:
    """GPTVQ's update: 25 steps of Adam from theta; while the final loss is higher, again with a tenth of the rate."""

    def total(theta: Tensor) -> Tensor:
        return problem.loss.value(problem.expand(theta)).sum()

    before = total(theta_T)
    for run in range(ADAM_RUNS):
        moved_T = theta_T.clone()
        optimizer = torch.optim.Adam([moved_T], lr=ADAM_RATE * 0.1**run)
        for _ in range(ADAM_STEPS):
            moved_T.grad = -2 * problem.descent(moved_T)
            optimizer.step()
        if total(moved_T) < before:
            moved_T.grad = None
            return moved_T
    return theta_T


def _update_factors(
    loss: LayerLoss, old: dict[str, Tensor], minimise: Callable[[Problem, Tensor], Tensor]
) -> dict[str, Tensor]:
    number_format = loss.number_format
    factors_GCr = old["codebooks"].to(torch.float32) * old["codebook_scales"].to(torch.float32).unsqueeze(-1)
    basis_rK = old["codebook_basis"]
    for _ in range(LOW_RANK_ROUNDS):
        factors_GCr = minimise(factor_problem(loss, basis_rK), factors_GCr)
        basis_rK = minimise(basis_problem(loss, factors_GCr), basis_rK.unsqueeze(0)).squeeze(0)
    return number_format.encode_factors(factors_GCr.flatten(0, 1), basis_rK)


def _broadcast(x_G: Tensor, like: Tensor) -> Tensor:
    return x_G.reshape(-1, *[1] * (like.dim() - 1))


def _dot(a_T: Tensor, b_T: Tensor) -> Tensor:
    """One product per entry of the first dim, in float64, shaped to multiply with either."""
    return (a_T * b_T).sum(tuple(range(1, a_T.dim())), keepdim=True, dtype=torch.float64)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient in float32; 0 where the denominator is 0, because that problem is solved."""
    return torch.where(denominator > 0, numerator / denominator, 0.0).to(torch.float32)
