"""The launches and the branch of products of tokens that stay in registers; test_halves.py and test_trellis.py compare
them with float64."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import (
    DEVICE,
    DTYPE,
    build_layer,
    random_input,
    random_trellis,
    relative_error,
)

from lqer.formats import MXInt, QuantizedTensor, Trellis
from lqer.kernels import PackedLinear
from lqer.kernels.joint import join
from lqer.kernels.layout.trellis import TrellisLayout
from lqer.kernels.reference import reference_linear
from lqer.kernels.runtime import supports_pdl
from lqer.kernels.trellis.resident_launch import ResidentLaunch, resident_launch, run_resident
from lqer.transforms.hadamard import RandomHadamard, hadamard, inverse_hadamard, random_hadamard

ROOM = 32.0 if torch.float16 == DTYPE else 1.0


def random_codes(n: int, k: int, bits: int = 2, state_bits: int = 12) -> QuantizedTensor:
    return random_trellis(Trellis(bits, state_bits, "bytes"), n, k)


def run(x_MI: torch.Tensor, packed: PackedLinear, *launched: ResidentLaunch) -> torch.Tensor:
    return run_resident(x_MI, packed, supports_pdl(x_MI), *launched, out_dtype=torch.float32)


def rotated(n: int, k: int) -> tuple[PackedLinear, torch.Tensor, RandomHadamard]:
    weight, basis = random_codes(n, k), random_hadamard(n, k, seed=1).to(DTYPE)
    bias_O = torch.linspace(-1, 1, n, device=DEVICE)
    return PackedLinear.pack(weight, None, None, bias_O, None, DTYPE, basis), weight.dequantize().double(), basis


def exact(x_MI: torch.Tensor, values_OI: torch.Tensor, basis: RandomHadamard, packed: PackedLinear) -> torch.Tensor:
    """In float64, with x' rounded to the dtype of the layer, as it does."""
    x = hadamard(x_MI.double() * basis.input_signs_I.to(x_MI).double() / ROOM).to(DTYPE).double()
    y = inverse_hadamard(x @ values_OI.T) * basis.output_signs_O.to(x_MI).double() * ROOM
    return y + packed.bias_O.double()


@pytest.mark.parametrize("launched", [(1, 1, 1), (2, 1, 2), (1, 2, 6), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("m", [2, 6, 20])
def test_every_launch_gives_the_same_layer(launched, m):
    """Of 11 tiles, which no launch divides, and of six row groups."""
    packed, values_OI, basis = rotated(96, 11 * 128)
    x_MI = random_input(m, 11 * 128)
    y_MO = run(x_MI, packed, ResidentLaunch(*launched))
    assert relative_error(y_MO, exact(x_MI, values_OI, basis, packed)) < 6e-4


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
