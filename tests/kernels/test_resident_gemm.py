"""Products of tokens that stay in registers with trellis codes, and the rotations around them."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import (
    DEVICE,
    DTYPE,
    ON_GPU,
    build_layer,
    random_input,
    random_trellis,
    relative_error,
)

from lqer.formats import MXInt, QuantizedTensor, Trellis
from lqer.kernels import PackedLinear, rotations_launch
from lqer.kernels.joint import join
from lqer.kernels.reference import reference_linear
from lqer.kernels.resident_launch import ResidentLaunch, resident_launch, run_resident
from lqer.kernels.runtime import supports_pdl
from lqer.kernels.trellis import TrellisLayout
from lqer.transforms.hadamard import RandomHadamard, hadamard, inverse_hadamard, random_hadamard

ROOM = 32.0 if torch.float16 == DTYPE else 1.0


def random_codes(n: int, k: int, bits: int = 2, state_bits: int = 12) -> QuantizedTensor:
    return random_trellis(Trellis(bits, state_bits, "bytes"), n, k)


def run(x_MI: torch.Tensor, packed: PackedLinear, *launched: ResidentLaunch) -> torch.Tensor:
    return run_resident(x_MI, packed, supports_pdl(x_MI), *launched, out_dtype=torch.float32)


def plain(n: int, k: int, *widths: int) -> tuple[PackedLinear, torch.Tensor]:
    weight = random_codes(n, k, *widths)
    return PackedLinear.pack(weight, None, None, None, None, DTYPE), weight.dequantize().double()


def rotated(n: int, k: int) -> tuple[PackedLinear, torch.Tensor, RandomHadamard]:
    weight, basis = random_codes(n, k), random_hadamard(n, k, seed=1).to(DTYPE)
    bias_O = torch.linspace(-1, 1, n, device=DEVICE)
    return PackedLinear.pack(weight, None, None, bias_O, None, DTYPE, basis), weight.dequantize().double(), basis


def exact(x_MI: torch.Tensor, values_OI: torch.Tensor, basis: RandomHadamard, packed: PackedLinear) -> torch.Tensor:
    """In float64, with x' rounded to the dtype of the layer, as it does."""
    x = hadamard(x_MI.double() * basis.input_signs_I.to(x_MI).double() / ROOM).to(DTYPE).double()
    y = inverse_hadamard(x @ values_OI.T) * basis.output_signs_O.to(x_MI).double() * ROOM
    return y + packed.bias_O.double()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("state_bits", [12, 16])
def test_the_product_is_exact_for_every_format(bits, state_bits):
    """A token that is one in one column: y is that column of the weight, exactly."""
    packed, values_OI = plain(64, 512, bits, state_bits)
    columns = torch.arange(0, 512, 1 if ON_GPU else 29)
    for some in columns.split(16):
        x_MI = torch.zeros(len(some), 512, dtype=DTYPE, device=DEVICE)
        x_MI[torch.arange(len(some)), some] = 1
        assert torch.equal(run(x_MI, packed).double(), values_OI[:, some].T)


@pytest.mark.parametrize(("n", "k"), [(16, 16), (80, 384), (48, 688), (112, 1152)])
def test_sums_equal_float64_to_the_precision_of_float32(n, k):
    packed, values_OI = plain(n, k)
    for m in (1, 3, 5, 33) if ON_GPU else (3, 5):
        x_MI = random_input(m, k)
        assert relative_error(run(x_MI, packed), x_MI.double() @ values_OI.T) < 2e-5


@pytest.mark.parametrize(
    ("n", "k"), [(64, 256), (160, 688), (688, 160), (16, 96), (2048, 128), *[(11008, 4096), (4096, 11008)] * ON_GPU]
)
@pytest.mark.parametrize("values", [1024, 256])
def test_rotations_of_every_length_give_the_formula(n, k, values, monkeypatch):
    """Powers of two, lengths with one odd factor, and blocks that do not fill the last program."""
    monkeypatch.setattr(rotations_launch, "MOST_VALUES", values)
    packed, values_OI, basis = rotated(n, k)
    for m in (1, 5, 64) if ON_GPU and n * k > 1 << 20 else (1, 5):
        x_MI = random_input(m, k)
        # x' is occasionally rounded to the dtype in the other direction.
        error = relative_error(run(x_MI, packed), exact(x_MI, values_OI, basis, packed))
        assert error < (6e-4 if torch.bfloat16 == DTYPE else 1e-4)


@pytest.mark.parametrize("m", range(1, 65) if ON_GPU else (1, 8, 11, 20))
def test_every_number_of_tokens_gives_the_sums_of_each_alone(m):
    packed, values_OI = plain(64, 384)
    x_MI = random_input(m, 384)
    assert relative_error(run(x_MI, packed), x_MI.double() @ values_OI.T) < 2e-5


@pytest.mark.parametrize("launched", [(1, 1, 1), (2, 1, 2), (1, 2, 6), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("m", [2, 6, 20])
def test_every_launch_gives_the_same_layer(launched, m):
    """Of 11 tiles, which no launch divides, and of six row groups."""
    packed, values_OI, basis = rotated(96, 11 * 128)
    x_MI = random_input(m, 11 * 128)
    y_MO = run(x_MI, packed, ResidentLaunch(*launched))
    assert relative_error(y_MO, exact(x_MI, values_OI, basis, packed)) < 6e-4


def test_a_token_of_large_elements_does_not_overflow_float16():
    """One column of 60000, and a token whose rotation has a single element, the norm of the token."""
    packed, values_OI = plain(32, 256)
    x_MI = torch.zeros(5, 256, dtype=DTYPE, device=DEVICE)
    x_MI[:, 3] = 60000.0
    x_MI[2, 9] = 0.25
    expected = x_MI.double() @ values_OI.T
    assert relative_error(run(x_MI, packed), expected) < 1e-6
    packed, values_OI, basis = rotated(32, 1024)
    x_MI = (3000 * basis.input_signs_I.to(DEVICE, DTYPE)).expand(5, -1)
    assert relative_error(run(x_MI, packed), exact(x_MI, values_OI, basis, packed)) < 6e-4


def test_a_token_that_is_not_finite_gives_no_finite_output_and_spoils_no_other():
    packed, values_OI = plain(32, 256)
    for value in (float("inf"), float("nan")):
        x_MI = random_input(7, 256)
        x_MI[1, 7] = value
        y_MO = run(x_MI, packed)
        assert not torch.isfinite(y_MO[1]).any()
        others = [0, *range(2, 7)]
        assert relative_error(y_MO[others], (x_MI[others].double() @ values_OI.T)) < 2e-5


@pytest.mark.parametrize("m", [1, 9])
def test_runs_agree_bit_for_bit(m):
    packed, _, _ = rotated(64, 512)
    x_MI = random_input(m, 512)
    first = run(x_MI, packed, ResidentLaunch(1, 2, 3))
    for _ in range(2):
        assert torch.equal(run(x_MI, packed, ResidentLaunch(1, 2, 3)), first)


@pytest.mark.parametrize(("m", "rank"), [(3, 16), (6, 48), (20, 64)])
def test_a_branch_of_one_linear_or_of_several_is_added(m, rank):
    """Segments begin within the rows of a program."""
    layers = [build_layer(MXInt(4), n, 384, rank) for n in (256, 128)]
    packed = [
        PackedLinear.pack(random_codes(n, 384), of.a, of.b, of.bias_O, None, DTYPE)
        for n, of in zip((256, 128), layers, strict=True)
    ]
    x_MI = random_input(m, 384)
    expected = torch.cat([reference_linear(x_MI, linear) for linear in packed], dim=1).double()
    together = join(packed)
    for programs in (1, 7):
        y_MO = run(x_MI, together, ResidentLaunch(1, 1, programs))
        parts = [y_MO[:, segment.rows_of_all] for segment in together.spec.segments]
        assert relative_error(torch.cat(parts, dim=1), expected) < 3e-3


def test_every_multiprocessor_has_about_as_many_row_groups():
    for (rows, columns), splits in {
        (22016, 4096): 1, (12288, 4096): 1, (4096, 4096): 1, (4096, 11008): 3, (8192, 8192): 2
    }.items():  # fmt: skip
        launch = resident_launch(TrellisLayout(rows, columns, 2, 12, 2), 16, 132)
        assert launch.splits == splits
        assert 128 <= launch.splits * launch.programs <= 132
