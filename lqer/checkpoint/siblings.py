"""Finds the linears of a loaded model that read the same input, and has kernels run them as one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.nn.experts import experts_of
from lqer.transforms.quarot import carry_over
from lqer.transforms.tracing import trace

if TYPE_CHECKING:
    from lqer.kernels import TritonLinear

PROBED_TOKENS = 4


@torch.no_grad()
def join_siblings(model: PreTrainedModel, blocks: nn.Module) -> None:
    """Let linears of a decoder block that are called with the same tensor run together, where they are of one kind.

    They are found as calibration finds its sites, by running a few tokens, so no architecture is named; the linears
    answer with zeros, as no kernel need be compiled for so few. Experts are left as they are: which of them are called
    depends on the tokens. Names, and the tensors of the state_dict, stay. Raises ModelError where kernels of linears
    side by side differ from plain torch.
    """
    # Where nobody has imported the package, nothing of it can be in a model; importing it takes half a second.
    if "lqer.kernels" not in sys.modules:
        return
    from lqer.kernels import TritonLinear
    from lqer.kernels.joint import can_join, kind_of

    found = [module for module in blocks.modules() if isinstance(module, TritonLinear)]
    if not found:
        return
    device = cast(Tensor, model.get_input_embeddings().weight).device
    ids_BT = torch.arange(PROBED_TOKENS, device=device).unsqueeze(0)
    with _answering_zeros(found):
        watched = trace(blocks, lambda: model(input_ids=ids_BT, use_cache=False), TritonLinear)
    of_experts = tuple(f"{name}." for name in experts_of(blocks))
    for site in watched.sites():
        by_kind: dict[object, list[str]] = {}
        for name in site:
            if not name.startswith(of_experts):
                linear = cast(TritonLinear, blocks.get_submodule(name))
                by_kind.setdefault(kind_of(linear.packed), []).append(name)
        for names in by_kind.values():
            linears = [cast(TritonLinear, blocks.get_submodule(name)) for name in names]
            if len(names) == 1 or not can_join([linear.packed for linear in linears]):
                continue
            for name, linear, sibling in zip(names, linears, _joined(names, linears), strict=True):
                carry_over(linear, sibling)
                blocks.set_submodule(name, sibling)


@contextmanager
def _answering_zeros(linears: Sequence[TritonLinear]) -> Iterator[None]:
    def zeros(rows: int, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], rows)

    try:
        for linear in linears:
            linear.forward = partial(zeros, linear.out_features)  # type: ignore[method-assign]
        yield
    finally:
        for linear in linears:
            del linear.forward


def _joined(names: Sequence[str], linears: Sequence[TritonLinear]) -> Sequence[nn.Module]:
    from lqer.kernels.siblings import Siblings

    try:
        return Siblings(linears).linears
    except ArithmeticError as error:
        raise ModelError(f'{", ".join(names)}: {error}; use backend = "emulate"') from None
