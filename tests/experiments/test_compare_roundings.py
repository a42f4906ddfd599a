from __future__ import annotations

import pytest
import torch
from compare_roundings import ANY, INNER, print_table
from measures.errors import relative_error

from lqer.formats import Int

SCHEMES = {**ANY, **INNER}


@pytest.fixture(scope="module")
def layer():
    """A weight and E[x xᵀ] of inputs whose sizes vary."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    x_TI *= torch.randn(64, generator=generator).exp()
    return torch.randn(32, 64, generator=generator), x_TI.T @ x_TI / len(x_TI)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_the_weight_back_in_its_own_order_and_scale(layer, scheme):
    weight_OI, hessian_II = layer
    found_OI = SCHEMES[scheme](weight_OI, hessian_II, Int(bits=8, block_size=16))
    assert torch.linalg.vector_norm(found_OI - weight_OI) < 0.02 * torch.linalg.vector_norm(weight_OI)
    assert relative_error(weight_OI, found_OI, hessian_II.double()) < 1e-4


def test_the_table_has_a_row_for_each_kind_and_each_inner_linear(capsys):
    both = dict.fromkeys(["inputs", *SCHEMES], (2.0, 1.0))
    print_table({"b.0.q": {name: both[name] for name in ("inputs", *ANY)}, "b.0.down": both, "b.1.down": both})
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == ["| q", "| down", "| b.0.down", "| b.1.down"]
