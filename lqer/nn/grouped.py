"""Projections of groups of inputs as linears: each group has a matrix of its own, whose rows a model holds together.

    y_tg = W_g x_tg        x (.., groups, I), y (.., groups, R), W (groups · R, I)

DeepSeek-V4's attention ends with one, as its heads would make a plain projection very large. Such modules are known by
their number of groups, and by computing that formula.

Shapes: T tokens, G groups, I in_features, R out_features of a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Sizes that a module is compared with the formula in.
PROBED_TOKENS, PROBED_ROWS, PROBED_COLUMNS = 3, 2, 4


class GroupedLinear(nn.Module):
    """The linears of all groups, submodules by number."""

    def __init__(self, linears: list[nn.Linear]):
        super().__init__()
        self.groups = len(linears)
        for group, linear in enumerate(linears):
            self.add_module(str(group), linear)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., groups, I) -> (..., groups, R)."""
        outputs = [self.get_submodule(str(group))(x_TI) for group, x_TI in enumerate(x.unbind(-2))]
        return torch.stack(outputs, dim=-2)


def grouped(model: nn.Module) -> Iterator[tuple[str, nn.Linear, int]]:
    """The projections of groups that hold their matrices together: name, module and number of groups."""
    for name, module in model.named_modules():
        groups = getattr(module, "n_groups", None)
        if isinstance(module, nn.Linear) and isinstance(groups, int) and _multiplies_groups(module, groups):
            yield name, module, groups


def split_groups(model: nn.Module) -> None:
    """Replace every projection of groups by linears, in place."""
    for name, module, groups in list(grouped(model)):
        # Copies: views would keep the whole matrix in memory.
        parts = [part_RI.clone() for part_RI in module.weight.detach().chunk(groups)]
        model.set_submodule(name, GroupedLinear([_linear(part_RI) for part_RI in parts]))


def _linear(weight_RI: Tensor) -> nn.Linear:
    linear = nn.Linear(weight_RI.shape[1], weight_RI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_RI, requires_grad=False)
    return linear


def _multiplies_groups(module: nn.Linear, groups: int) -> bool:
    if module.bias is not None or module.out_features % groups:
        return False
    generator = torch.Generator().manual_seed(0)
    weight_GRI = torch.randn(groups, PROBED_ROWS, PROBED_COLUMNS, generator=generator, device="cpu")
    x_TGI = torch.randn(PROBED_TOKENS, groups, PROBED_COLUMNS, generator=generator, device="cpu")
    try:
        y_TGR = functional_call(module, {"weight": weight_GRI.flatten(0, 1)}, x_TGI)
    except RuntimeError:  # it takes other shapes
        return False
    expected_TGR = torch.einsum("tgi,gri->tgr", x_TGI, weight_GRI)
    return y_TGR.shape == expected_TGR.shape and torch.allclose(y_TGR, expected_TGR, atol=1e-5)
