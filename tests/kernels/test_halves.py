"""Products of tokens in float16 with trellis and lattice codes, and the rotations around them."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, random_input, random_lattice, random_trellis, relative_error

from lqer.formats import Trellis
from lqer.kernels import PackedLinear
from lqer.kernels.lattice.halves_launch import AT_ONCE, run_lattice_halves
from lqer.kernels.layout.lattice import LatticeLayout
from lqer.kernels.rotations import launch as rotations_launch
from lqer.kernels.rotations.launch import headroom
from lqer.kernels.runtime import supports_pdl
from lqer.kernels.trellis.resident_launch import run_resident
from lqer.transforms.hadamard import RandomHadamard, hadamard, inverse_hadamard, random_hadamard


def trellis(bits: int, state_bits: int = 12):
    return lambda n, k: random_trellis(Trellis(bits, state_bits, "bytes"), n, k)


CODES = {"trellis": trellis(2), "lattice": random_lattice}
ALL_CODES = {
    f"trellis {bits} {state_bits}": trellis(bits, state_bits) for bits in (1, 2, 3, 4) for state_bits in (12, 16)
} | {"lattice": random_lattice}
BY_CODES = pytest.mark.parametrize("codes", CODES)


def run(x_MI: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    run_codes = run_lattice_halves if isinstance(packed.spec.layout, LatticeLayout) else run_resident
    return run_codes(x_MI, packed, supports_pdl(x_MI), out_dtype=torch.float32)


def plain(codes: str, n: int, k: int) -> tuple[PackedLinear, torch.Tensor]:
    weight = ALL_CODES.get(codes, CODES.get(codes))(n, k)
    return PackedLinear.pack(weight, None, None, None, None, DTYPE), weight.dequantize().double()


def rotated(codes: str, n: int, k: int, dtype=DTYPE) -> tuple[PackedLinear, torch.Tensor, RandomHadamard]:
    weight, basis = CODES[codes](n, k), random_hadamard(n, k, seed=1).to(dtype)
    bias_O = torch.linspace(-1, 1, n, device=DEVICE)
    return PackedLinear.pack(weight, None, None, bias_O, None, dtype, basis), weight.dequantize().double(), basis


def exact(x_MI: torch.Tensor, values_OI: torch.Tensor, basis: RandomHadamard, packed: PackedLinear) -> torch.Tensor:
    """In float64, with x' rounded to the dtype of the layer, as it does."""
    room = headroom(packed.dtype)
    x = hadamard(x_MI.double() * basis.input_signs_I.to(x_MI).double() / room).to(packed.dtype).double()
    y = inverse_hadamard(x @ values_OI.T) * basis.output_signs_O.to(x_MI).double() * room
    return y + packed.bias_O.double()


@pytest.mark.parametrize("codes", ALL_CODES)
def test_the_product_is_exact_for_every_format(codes):
    """A token that is one in one column: y is that column of the weight, exactly."""
    packed, values_OI = plain(codes, 64, 512)
    columns = torch.arange(0, 512, 1 if ON_GPU else 29)
    for some in columns.split(16):
        x_MI = torch.zeros(len(some), 512, dtype=DTYPE, device=DEVICE)
        x_MI[torch.arange(len(some)), some] = 1
        assert torch.equal(run(x_MI, packed).double(), values_OI[:, some].T)


@BY_CODES
@pytest.mark.parametrize(("n", "k"), [(16, 16), (80, 384), (48, 688), (112, 1152)])
def test_sums_equal_float64_to_the_precision_of_float32(n, k, codes):
    packed, values_OI = plain(codes, n, k)
    for m in (5, 33 if codes == "trellis" else 32) if ON_GPU else (5,):
        x_MI = random_input(m, k)
        assert relative_error(run(x_MI, packed), x_MI.double() @ values_OI.T) < 2e-5


@BY_CODES
@pytest.mark.parametrize(
    ("n", "k"), [(64, 256), (160, 688), (688, 160), (16, 96), (2048, 128), *[(11008, 4096), (4096, 11008)] * ON_GPU]
)
@pytest.mark.parametrize("values", [1024, 256])
def test_rotations_of_every_length_give_the_formula(n, k, codes, values, monkeypatch):
    """Powers of two, lengths with one odd factor, and blocks that do not fill the last program."""
    monkeypatch.setattr(rotations_launch, "MOST_VALUES", values)
    packed, values_OI, basis = rotated(codes, n, k)
    for m in (5, 64 if codes == "trellis" else 32) if ON_GPU and n * k > 1 << 20 else (5,):
        x_MI = random_input(m, k)
        # x' is occasionally rounded to the dtype in the other direction.
        error = relative_error(run(x_MI, packed), exact(x_MI, values_OI, basis, packed))
        assert error < (6e-4 if torch.bfloat16 == DTYPE else 1e-4)


@BY_CODES
@pytest.mark.parametrize("m", range(1, 65) if ON_GPU else (1, 8, 11, 20))
def test_every_number_of_tokens_gives_the_sums_of_each_alone(m, codes):
    if codes == "lattice" and m > AT_ONCE:
        pytest.skip("lattice codes have less shared memory")
    packed, values_OI = plain(codes, 64, 384)
    x_MI = random_input(m, 384)
    assert relative_error(run(x_MI, packed), x_MI.double() @ values_OI.T) < 2e-5


@BY_CODES
def test_a_token_of_large_elements_does_not_overflow_float16(codes):
    """One column of 60000, and a token whose rotation has a single element, the norm of the token."""
    packed, values_OI = plain(codes, 32, 256)
    x_MI = torch.zeros(5, 256, dtype=DTYPE, device=DEVICE)
    x_MI[:, 3] = 60000.0
    x_MI[2, 9] = 0.25
    expected = x_MI.double() @ values_OI.T
    assert relative_error(run(x_MI, packed), expected) < 1e-6
    packed, values_OI, basis = rotated(codes, 32, 1024, torch.float16)
    x_MI = (3000 * basis.input_signs_I.to(DEVICE)).expand(5, -1)
    assert relative_error(run(x_MI, packed), exact(x_MI, values_OI, basis, packed)) < 6e-4


@BY_CODES
def test_a_token_that_is_not_finite_gives_no_finite_output_and_spoils_no_other(codes):
    packed, values_OI = plain(codes, 32, 256)
    for value in (float("inf"), float("nan")):
        x_MI = random_input(7, 256)
        x_MI[1, 7] = value
        y_MO = run(x_MI, packed)
        assert not torch.isfinite(y_MO[1]).any()
        others = [0, *range(2, 7)]
        assert relative_error(y_MO[others], (x_MI[others].double() @ values_OI.T)) < 2e-5
