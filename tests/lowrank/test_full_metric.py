"""Reconstruction under a full Hessian R, by both solvers, against R's square root and an SVD in float64.

Shapes: I in_features, O out_features, R rank, T tokens, K = min(I, O).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lqer.lowrank import krylov, krylov_space
from lqer.lowrank.exact import singular_values
from lqer.lowrank.metric import Metric
from lqer.lowrank.solver import Factors, reconstruct, uses_krylov

SHAPES = [(24, 40), (40, 24), (32, 32)]  # (out, in)
each_shape = pytest.mark.parametrize("shape", SHAPES)
LARGE = (480, 640)  # room for the space that rank 8 may need


def correlated(in_features: int, tokens: int, generator: torch.Generator) -> Tensor:
    """R of correlated inputs with outlier channels; singular where there are fewer tokens than inputs."""
    mixing_II = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    scale_I = torch.logspace(-1.5, 1.5, in_features)[torch.randperm(in_features, generator=generator)]
    x_TI = torch.randn(tokens, in_features, generator=generator) @ (torch.eye(in_features) + mixing_II) * scale_I
    return (x_TI.T.double() @ x_TI.double() / tokens).float()


def problem(shape: tuple[int, int], tokens: int = 500) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 0.01, correlated(shape[1], tokens, generator)


def root(hessian_II: Tensor) -> Tensor:
    """The symmetric square root, in float64."""
    eigenvalues_I, vectors_II = torch.linalg.eigh(hessian_II.double())
    return vectors_II * eigenvalues_I.clamp(min=0).sqrt() @ vectors_II.T


def loss(error_OI: Tensor, factors: Factors, hessian_II: Tensor) -> float:
    left_IO = error_OI.T.double() - factors.a_IR.double() @ factors.b_RO.double()
    return float((left_IO * (hessian_II.double() @ left_IO)).sum())


def tail(error_OI: Tensor, hessian_II: Tensor, rank: int) -> float:
    sigma_K = torch.linalg.svdvals(root(hessian_II) @ error_OI.T.double())
    return float(sigma_K[rank:].square().sum())


@each_shape
@pytest.mark.parametrize("rank", [1, 5, 23])
def test_the_loss_is_the_tail_of_the_spectrum(shape, rank):
    error_OI, r_II = problem(shape)
    factors = reconstruct(error_OI, Metric(hessian_II=r_II), rank)
    assert loss(error_OI, factors, r_II) == pytest.approx(tail(error_OI, r_II, rank), rel=1e-5)
    assert factors.gap is None


@each_shape
def test_the_product_is_that_of_the_papers_square_root_svd_and_solve(shape):
    error_OI, r_II = problem(shape)
    root_II = root(r_II)
    u_IK, sigma_K, vt_KO = torch.linalg.svd(root_II @ error_OI.T.double(), full_matrices=False)
    expected_IO = torch.linalg.solve(root_II, u_IK[:, :6]) @ (sigma_K[:6, None] * vt_KO[:6])
    factors = reconstruct(error_OI, Metric(hessian_II=r_II), 6)
    torch.testing.assert_close(factors.a_IR.double() @ factors.b_RO.double(), expected_IO, rtol=1e-4, atol=1e-7)


@each_shape
def test_a_diagonal_r_is_a_scale(shape):
    error_OI, _ = problem(shape)
    scale_I = torch.logspace(-1, 1, shape[1])
    full = reconstruct(error_OI, Metric(hessian_II=scale_I.square().diag()), 5)
    scaled = reconstruct(error_OI, Metric(scale_I=scale_I), 5)
    torch.testing.assert_close(full.a_IR @ full.b_RO, scaled.a_IR @ scaled.b_RO, rtol=1e-4, atol=1e-7)


@each_shape
@pytest.mark.parametrize("tokens", [7, 500])
def test_full_rank_is_exact_even_where_r_is_singular(shape, tokens):
    error_OI, r_II = problem(shape, tokens)
    factors = reconstruct(error_OI, Metric(hessian_II=r_II), 1000)
    torch.testing.assert_close(factors.a_IR @ factors.b_RO, error_OI.T, rtol=1e-5, atol=1e-8)


@each_shape
@pytest.mark.parametrize("rank", [3, 10])
def test_a_singular_r_leaves_the_tail_and_finite_factors(shape, rank):
    error_OI, r_II = problem(shape, tokens=7)
    factors = reconstruct(error_OI, Metric(hessian_II=r_II), rank)
    assert factors.a_IR.isfinite().all()
    assert factors.b_RO.isfinite().all()
    whole = tail(error_OI, r_II, 0)
    assert loss(error_OI, factors, r_II) == pytest.approx(tail(error_OI, r_II, rank), rel=1e-4, abs=1e-6 * whole)


def test_inputs_of_zero_give_factors_of_product_zero():
    error_OI, _ = problem((24, 40))
    factors = reconstruct(error_OI, Metric(hessian_II=torch.zeros(40, 40)), 4)
    assert not (factors.a_IR @ factors.b_RO).any()
    assert factors.captured_energy == 1


@each_shape
def test_singular_values_are_those_of_the_root_times_the_error(shape):
    error_OI, r_II = problem(shape)
    sigma_K = torch.linalg.svdvals(root(r_II) @ error_OI.T.double())
    torch.testing.assert_close(singular_values(error_OI, Metric(hessian_II=r_II)), sigma_K, rtol=1e-5, atol=1e-7)


def test_the_captured_energy_is_what_the_loss_lacks():
    for shape, solver in (((24, 40), "exact"), (LARGE, "krylov")):
        error_OI, r_II = problem(shape)
        metric = Metric(hessian_II=r_II)
        factors = reconstruct(error_OI, metric, 8, solver)
        whole = metric.energy(error_OI)
        assert whole == pytest.approx(tail(error_OI, r_II, 0), rel=1e-5)
        assert 1 - factors.captured_energy == pytest.approx(loss(error_OI, factors, r_II) / whole, abs=1e-5)


class TestKrylov:
    @pytest.mark.parametrize("shape", [LARGE, LARGE[::-1]])
    @pytest.mark.parametrize("tokens", [100, 2000])
    def test_it_is_within_its_stated_gap_of_the_optimum(self, shape, tokens):
        error_OI, r_II = problem(shape, tokens)
        metric = Metric(hessian_II=r_II)
        exact, found = (reconstruct(error_OI, metric, 8, solver) for solver in ("exact", "krylov"))
        assert found.gap is not None
        assert found.gap <= krylov.GAP_TOLERANCE
        optimum = exact.captured_energy
        assert found.captured_energy == pytest.approx(optimum, rel=max(2 * found.gap, 1e-5))
        whole = metric.energy(error_OI)
        assert loss(error_OI, found, r_II) / whole == pytest.approx(1 - found.captured_energy, abs=1e-5)

    def test_a_flat_spectrum_takes_more_steps_to_the_same_loss(self):
        error_OI = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
        exact, found = (reconstruct(error_OI, Metric(), 8, solver) for solver in ("exact", "krylov"))
        assert found.captured_energy >= 0.98 * exact.captured_energy
        assert 1 - found.captured_energy == pytest.approx(1 - exact.captured_energy, rel=2 * krylov.LOSS_TOLERANCE)

    def test_the_stated_gap_is_of_the_size_of_the_true_one(self, monkeypatch):
        """Stopped early, where there is a gap to speak of."""
        monkeypatch.setattr(krylov, "GAP_TOLERANCE", 1.0)
        monkeypatch.setattr(krylov, "LOSS_TOLERANCE", 1.0)
        error_OI = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
        exact, found = (reconstruct(error_OI, Metric(), 8, solver) for solver in ("exact", "krylov"))
        true_gap = 1 - found.captured_energy / exact.captured_energy
        assert true_gap > 0.01
        assert found.gap == pytest.approx(true_gap, rel=0.5)

    @pytest.mark.parametrize("copies", [26, 40, 100])
    @pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1])
    def test_eigenvalues_repeated_more_often_than_a_block_is_wide_are_found(self, copies, spread):
        """Equal ones, nearly equal ones, a cluster: in random directions, above a spectrum that falls slowly."""
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(size, 300, generator=generator))[0] for size in LARGE)
        cluster = 10 * (1 + spread * torch.linspace(-0.5, 0.5, copies))
        spectrum = torch.cat([cluster, torch.linspace(6, 1, 300 - copies)])
        found = reconstruct((left * spectrum) @ right.T, Metric(), 32, "krylov")
        assert krylov.block_width(32) < copies
        optimum = float(spectrum.sort(descending=True)[0][:32].double().square().sum())
        assert found.gap is not None
        assert float(found.singular_values.square().sum()) / optimum >= 1 - max(2 * found.gap, 1e-3)

    @pytest.mark.parametrize("basis_size", [0, 96])
    @pytest.mark.parametrize(
        "kind", ["random", "zero", "in the span", "few", "few beside the span", "graded", "equal", "tiny"]
    )
    def test_a_block_is_orthonormal_whatever_it_adds_to_the_basis(self, kind, basis_size):
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        basis_DO = torch.linalg.qr(random(480, basis_size))[0].T
        within_LO = (random(24, basis_size) @ basis_DO).float()
        few_LO = (random(24, 3) @ random(3, 480)).float()
        block_LO = {
            "random": random(24, 480).float(),
            "zero": torch.zeros(24, 480),
            "in the span": 1e8 * within_LO,
            "few": few_LO,
            "few beside the span": within_LO + 1e-5 * few_LO,
            "graded": (random(24, 24) @ (torch.logspace(0, -12, 24)[:, None] * random(24, 480))).float(),
            "equal": random(1, 480).float().repeat(24, 1),
            "tiny": 1e-25 * random(24, 480).float(),
        }[kind]
        found_LO = krylov_space.orthonormal(block_LO, random(24, 480).float() / 480**0.5, basis_DO)
        rows = torch.cat([basis_DO, found_LO])
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=0.0, atol=1e-6)

    @pytest.mark.parametrize("error_rank", [0, 3])
    def test_an_error_of_less_rank_than_asked_for_is_recovered(self, error_rank):
        generator = torch.Generator().manual_seed(1)
        left, right = (torch.randn(size, error_rank, generator=generator) for size in LARGE)
        error_OI, r_II = left @ right.T, problem(LARGE)[1]
        factors = reconstruct(error_OI, Metric(hessian_II=r_II), 8, "krylov")
        assert factors.gap is not None
        assert factors.a_IR.isfinite().all()
        whole = Metric(hessian_II=r_II).energy(error_OI)
        assert loss(error_OI, factors, r_II) <= 1e-8 * whole

    def test_a_singular_r_of_less_rank_than_asked_for_is_solved(self):
        error_OI, r_II = problem(LARGE, tokens=5)
        factors = reconstruct(error_OI, Metric(hessian_II=r_II), 8, "krylov")
        assert factors.a_IR.isfinite().all()
        assert loss(error_OI, factors, r_II) <= 1e-7 * Metric(hessian_II=r_II).energy(error_OI)

    def test_the_same_seed_gives_the_same_bytes_and_another_one_others(self):
        error_OI, r_II = problem(LARGE)
        one, same, other = (reconstruct(error_OI, Metric(hessian_II=r_II), 8, "krylov", seed) for seed in (0, 0, 1))
        assert torch.equal(one.a_IR, same.a_IR)
        assert torch.equal(one.b_RO, same.b_RO)
        assert not torch.equal(one.b_RO, other.b_RO)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_finds_the_same_product(self):
        error_OI, r_II = problem(LARGE)
        here = reconstruct(error_OI, Metric(hessian_II=r_II), 8, "krylov")
        there = reconstruct(error_OI.cuda(), Metric(hessian_II=r_II.cuda()), 8, "krylov")
        product_IO = here.a_IR @ here.b_RO
        torch.testing.assert_close((there.a_IR @ there.b_RO).cpu(), product_IO, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize(("shape", "rank"), [((64, 96), 8), (LARGE, 470), (LARGE, 480)])
    def test_where_its_space_has_no_room_the_exact_solution_is_taken(self, shape, rank):
        error_OI, r_II = problem(shape)
        factors = reconstruct(error_OI, Metric(hessian_II=r_II), rank, "krylov")
        assert factors.gap is None
        assert torch.equal(factors.b_RO, reconstruct(error_OI, Metric(hessian_II=r_II), rank).b_RO)

    def test_auto_is_exact_on_small_matrices_and_krylov_on_large_ones(self):
        small, large = torch.randn(LARGE), torch.randn(1100, 1030)
        assert reconstruct(small, Metric(), 8, "auto").gap is None
        assert reconstruct(large, Metric(), 8, "auto").gap is not None
        assert reconstruct(large, Metric(), 200, "auto").gap is None

    def test_on_a_gpu_auto_iterates_wherever_that_saves_something(self):
        gpu, cpu = torch.device("cuda"), torch.device("cpu")
        assert [uses_krylov("auto", side, 32, gpu) for side in (671, 672, 768, 1025)] == [False, True, True, True]
        assert [uses_krylov("auto", side, 32, cpu) for side in (672, 1024, 1025)] == [False, False, True]
        assert [uses_krylov("krylov", side, 32, cpu) for side in (335, 336)] == [False, True]
        assert not uses_krylov("exact", 4096, 32, gpu)

    def test_too_small_an_error_is_refused_by_the_solver_itself(self):
        with pytest.raises(ValueError, match="rank 8 needs 336 rows, the error has 64"):
            krylov.solve_krylov(torch.zeros(64, 96), Metric(), 8, 0)

    def test_the_process_keeps_its_own_choice_of_precision(self):
        torch.set_float32_matmul_precision("high")
        try:
            reconstruct(torch.randn(LARGE), Metric(), 8, "krylov")
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")
