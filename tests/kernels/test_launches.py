"""How many kernels a site launches for one token: those of one linear, however many linears it has.

Shapes: M tokens, I in_features.
"""

from __future__ import annotations

import pytest
import torch
from kernel_layers import ON_GPU, build_layer, random_input, random_lattice, random_trellis, rotated_layers
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from lqer.formats import Int, MXInt, Trellis
from lqer.kernels import TritonLinear
from lqer.kernels.siblings import Siblings

COLUMNS, ROWS = 512, (256, 64, 64)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that are launched."""
    made: list[str] = []
    owner, method = (JITFunction, "run") if ON_GPU else (GridExecutor, "__call__")
    plain = getattr(owner, method)

    def counted(self, *arguments, **named):
        made.append(self.fn.__name__)
        return plain(self, *arguments, **named)

    monkeypatch.setattr(owner, method, counted)
    return made


def integers(number_format, rank=0, activation=None):
    return [build_layer(number_format, rows, COLUMNS, rank, activation).packed for rows in ROWS]


SITES = {
    "INT4 groups": (lambda: integers(Int(4, 128)), ["gemm_kernel"]),
    "INT4 groups with a branch": (lambda: integers(Int(4, 128), 32), ["gemm_kernel"]),
    "MXINT4": (lambda: integers(MXInt(4), 16), ["gemm_kernel"]),
    "W4A8 with a branch": (lambda: integers(MXInt(4), 16, MXInt(8)), ["prepare_vector_kernel", "gemv_kernel"]),
    "E8P, rotated, with a branch": (
        lambda: rotated_layers([random_lattice(rows, COLUMNS) for rows in ROWS], 16),
        ["rotate_input_kernel", "lattice_product_kernel", "rotate_output_kernel"],
    ),
    "byte sums, rotated": (
        lambda: rotated_layers([random_trellis(Trellis(2, table="bytes"), rows, COLUMNS) for rows in ROWS], 0),
        ["rotate_input_kernel", "resident_product_kernel", "rotate_output_kernel"],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
def test_the_linears_of_a_site_launch_the_kernels_of_one(site, launches):
    make, expected = SITES[site]
    single = [TritonLinear(packed) for packed in make()]
    joined, x_MI = Siblings(single).linears, random_input(1, COLUMNS)
    launches.clear()
    for linear in single:
        linear(x_MI)
    assert launches == expected * len(ROWS)
    launches.clear()
    for linear in joined:
        linear(x_MI)
    assert launches == expected
