"""The launches of products of lattice codes in float16; test_halves.py compares them with float64."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, random_input, random_lattice, relative_error

from lqer.kernels import PackedLinear
from lqer.kernels.lattice.halves_launch import LatticeHalvesLaunch, lattice_halves_launch, run_lattice_halves
from lqer.kernels.layout.lattice import LatticeLayout
from lqer.kernels.runtime import supports_pdl
from lqer.transforms.hadamard import random_hadamard


def rotated(n: int, k: int) -> PackedLinear:
    basis = random_hadamard(n, k, seed=1).to(DTYPE)
    bias_O = torch.linspace(-1, 1, n, device=DEVICE)
    return PackedLinear.pack(random_lattice(n, k), None, None, bias_O, None, DTYPE, basis)


def run(x_MI: torch.Tensor, packed: PackedLinear, *launched: LatticeHalvesLaunch) -> torch.Tensor:
    return run_lattice_halves(x_MI, packed, supports_pdl(x_MI), *launched, out_dtype=torch.float32)


@pytest.mark.parametrize(
    "launched", [(1, 1, 1), (2, 1, 4, 2), (1, 4, 2, 4, 128), (4, 2, 1, 8), (1, 8, 1, 3, 128)], ids=str
)
def test_every_launch_gives_the_same_layer(launched):
    """Of 8 tiles, and of 11, which no launch here divides."""
    for m, k in ((6, 1024), (20, 11 * 128)) if ON_GPU else ((6, 1024),):
        packed, x_MI = rotated(96, k), random_input(m, k)
        assert relative_error(run(x_MI, packed, LatticeHalvesLaunch(*launched)), run(x_MI, packed).double()) < 1e-5


def test_a_launch_whose_outputs_do_not_fit_beside_the_table_is_refused():
    with pytest.raises(ValueError, match="at most 128 rows, found 256"):
        LatticeHalvesLaunch(2, 8, 1)


def test_the_workspace_is_zero_after_a_call_and_runs_agree_bit_for_bit():
    packed, x_MI = rotated(64, 512), random_input(9, 512)
    first = run(x_MI, packed, LatticeHalvesLaunch(1, 2, 1, 4))
    for _ in range(2):
        assert torch.equal(run(x_MI, packed, LatticeHalvesLaunch(1, 2, 1, 4)), first)
        assert not packed.workspace.any()


def test_splits_share_the_columns_out_evenly_to_all_multiprocessors():
    wanted = {(22016, 4096): 2, (12288, 4096): 4, (4096, 4096): 8, (4096, 11008): 8, (48, 128): 1}
    found = {shape: lattice_halves_launch(LatticeLayout(*shape), 16, 132).splits for shape in wanted}
    assert found == wanted
