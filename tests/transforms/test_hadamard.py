"""Orthonormal, invertible, flat; what is rotated computes what it computed before."""

import pytest
import torch

from lqer.transforms.base import rotation_on
from lqer.transforms.hadamard import (
    Hadamard,
    RandomHadamard,
    _by_products,
    _by_sums,
    hadamard,
    inverse_hadamard,
    random_hadamard,
)
from lqer.transforms.hadamard_factors import small_factor, small_order, two_factors

# Dimensions of real models, small odd ones, and the order of the factor beside the power of two.
ORDERS = {
    1: 1, 2: 1, 64: 1, 4096: 1, 48: 12, 172: 43, 288: 36, 576: 36, 768: 12, 1536: 12, 5120: 20, 11008: 43, 13824: 108,
    14336: 28, 28672: 28, 7: 7, 6: 3, 104: 104,
}  # fmt: skip

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def normal(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("length", "order"), ORDERS.items())
def test_the_small_factor_has_the_order_expected(length, order):
    assert small_order(length) == order


@pytest.mark.parametrize("order", sorted({order for order in ORDERS.values() if order > 1}))
def test_small_factors_are_orthonormal_and_flat(order):
    factor_KK = small_factor(order)
    identity = torch.eye(order, dtype=torch.float64)
    torch.testing.assert_close(factor_KK @ factor_KK.T, identity, rtol=0.0, atol=1e-13)
    entries = factor_KK.abs() * order**0.5
    if order % 4 == 0:  # a Hadamard matrix
        torch.testing.assert_close(entries, torch.ones_like(entries), rtol=0.0, atol=1e-13)
    else:
        assert entries.max() <= 2**0.5 + 1e-12


@pytest.mark.parametrize("length", ORDERS)
def test_lengths_are_kept_and_the_inverse_recovers(length):
    x = normal(3, length)
    y = hadamard(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(inverse_hadamard(y), x, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("length", [16, 48, 172, 288])
def test_the_transform_is_the_product_with_the_kronecker_factor(length):
    order = small_order(length)
    matrix = small_factor(order) if order > 1 else torch.ones(1, 1, dtype=torch.float64)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < length // order:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5, sylvester)
    x = normal(5, length, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ torch.kron(matrix, sylvester).T)


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 172), (288, 768), (576, 1536)])
class TestRandomHadamard:
    def test_a_weight_is_recovered(self, out_features, in_features):
        rotation = random_hadamard(out_features, in_features, seed=1)
        weight_OI = normal(out_features, in_features)
        torch.testing.assert_close(rotation.inverse_weight(rotation.weight(weight_OI)), weight_OI, rtol=0.0, atol=1e-5)

    def test_the_energy_of_the_output_is_invariant(self, out_features, in_features):
        rotation = random_hadamard(out_features, in_features, seed=1)
        weight_OI = normal(out_features, in_features, dtype=torch.float64)
        x_TI = normal(50, in_features, seed=2, dtype=torch.float64) * torch.linspace(0.1, 3, in_features)
        hessian_II = x_TI.T @ x_TI
        rotated_II = rotation.hessian(hessian_II)
        rotated_OI = rotation.weight(weight_OI)
        assert torch.equal(rotated_II, rotated_II.T)
        before, after = (
            ((weight @ hessian) * weight).sum()
            for weight, hessian in ((weight_OI, hessian_II), (rotated_OI, rotated_II))
        )
        torch.testing.assert_close(after, before, rtol=1e-10, atol=0.0)

    def test_the_linear_computes_what_it_did(self, out_features, in_features):
        rotation = random_hadamard(out_features, in_features, seed=1)
        weight_OI, x_TI = normal(out_features, in_features), normal(4, in_features, seed=2)
        y_TO = rotation.output(rotation.input(x_TI) @ rotation.weight(weight_OI).T)
        torch.testing.assert_close(y_TO, x_TI @ weight_OI.T, rtol=0.0, atol=2e-4)

    def test_the_hessian_is_that_of_the_rotated_inputs(self, out_features, in_features):
        rotation = random_hadamard(out_features, in_features, seed=1)
        x_TI = normal(20, in_features, dtype=torch.float64)
        rotated_TI = rotation.input(x_TI)
        torch.testing.assert_close(rotation.hessian(x_TI.T @ x_TI), rotated_TI.T @ rotated_TI, rtol=0.0, atol=1e-10)

    def test_an_outlier_is_spread(self, out_features, in_features):
        weight_OI = torch.zeros(out_features, in_features)
        weight_OI[3, 5] = 1.0
        rotated_OI = random_hadamard(out_features, in_features, seed=1).weight(weight_OI)
        assert rotated_OI.abs().max() <= 2.0 / (out_features * in_features) ** 0.5 * 1.0001


def test_the_seed_decides_the_signs():
    first, again, other = (random_hadamard(48, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first.input_signs_I, again.input_signs_I)
    assert torch.equal(first.output_signs_O, again.output_signs_O)
    assert not torch.equal(first.input_signs_I, other.input_signs_I)
    assert first.input_signs_I.abs().eq(1).all()
    assert abs(float(first.input_signs_I.sum())) < 64


@pytest.mark.parametrize("length", [48, 67])
def test_signs_survive_being_packed(length):
    basis = random_hadamard(length, 2 * length, seed=0)
    packed = basis.pack()
    assert {name: (part.dtype, len(part)) for name, part in packed.items()} == {
        "input_signs": (torch.uint8, -(-2 * length // 8)),
        "output_signs": (torch.uint8, -(-length // 8)),
    }
    again = Hadamard().unpack(packed, length, 2 * length)
    assert torch.equal(again.input_signs_I, basis.input_signs_I)
    assert torch.equal(again.output_signs_O, basis.output_signs_O)


def test_signs_that_were_moved_are_stored_as_they_are():
    basis = RandomHadamard(torch.tensor([1.0, -0.5, 1.0]), torch.tensor([1.0, -1.0]))
    again = Hadamard().unpack(basis.pack(), 2, 3)
    assert torch.equal(again.input_signs_I, basis.input_signs_I)
    assert torch.equal(again.output_signs_O, basis.output_signs_O)
    assert basis.bits == 3 * 32 + 8


def test_halves_are_rounded_once():
    x = normal(4, 288).to(torch.bfloat16)
    assert torch.equal(hadamard(x), hadamard(x.float()).to(torch.bfloat16))


def test_half_precision_stays_half_precision():
    x = normal(4, 288).to(torch.bfloat16)
    assert hadamard(x).dtype == torch.bfloat16
    torch.testing.assert_close(hadamard(x).float(), hadamard(x.float()), rtol=0.1, atol=0.05)


def test_a_length_of_zero_is_refused():
    with pytest.raises(ValueError, match="length 0 of a Hadamard transform is not positive"):
        small_order(0)


@pytest.mark.parametrize("length", [1, 64, 172, 288, 768])
@pytest.mark.parametrize("largest", [16, 128])
def test_two_factors_are_those_of_the_transform(length, largest):
    outer_AA, inner_BB = two_factors(length, largest)
    x = normal(3, length, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ torch.kron(outer_AA, inner_BB).T)


@pytest.mark.parametrize("length", [64, 172, 768])
@pytest.mark.parametrize("inverse", [False, True])
def test_products_are_the_sums_and_differences(length, inverse):
    x = normal(3, length)
    torch.testing.assert_close(_by_products(x, inverse).reshape(x.shape), _by_sums(x, inverse).reshape(x.shape))


@pytest.mark.parametrize("length", [64, 4096, 688])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_half_precision_is_rotated_as_float32_is(length, device):
    rotation = random_hadamard(length, length, seed=3)
    x = normal(5, length).to(device, torch.bfloat16)
    for rotate in (RandomHadamard.input, RandomHadamard.output):
        moved = RandomHadamard(rotation.input_signs_I.to(device), rotation.output_signs_O.to(device))
        torch.testing.assert_close(rotate(moved, x).float(), rotate(moved, x.float()), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("length", [64, 4096, 28672])
@NEEDS_GPU
def test_gradients_on_a_gpu_are_those_of_a_cpu(length):
    signs, x = random_hadamard(length, length, seed=3).input_signs_I, normal(5, length)
    found = []
    for device in ("cpu", "cuda"):
        # A copy, also on the CPU: marking the shared tensor would make its copy on the GPU no leaf.
        given = signs.clone().to(device).requires_grad_(), x.to(device)
        rotated = RandomHadamard(given[0], given[0]).input(given[1])
        (rotated * normal(5, length, seed=4).to(device)).sum().backward()
        found.append((rotated.detach().cpu(), given[0].grad.cpu()))
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_linears_of_one_shape_share_a_rotation_on_their_device(device):
    shared = rotation_on(Hadamard(), 48, 64, 3, torch.device(device))
    assert rotation_on(Hadamard(), 48, 64, 3, torch.device(device)) is shared
    weight_OI = normal(48, 64)
    found, expected = shared.weight(weight_OI.to(device)), random_hadamard(48, 64, seed=3).weight(weight_OI)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    # A file holds no tensor twice.
    first, second = shared.pack()["input_signs"], shared.pack()["input_signs"]
    assert first.equal(second)
    assert first.data_ptr() != second.data_ptr()
    assert shared.bits == 48 + 64
