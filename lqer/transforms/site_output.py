"""The error of a site's output under other weights of its linears: what candidates for a scale are compared by.

The output is that of the innermost module around all linears of the site: attention for q, k and v, the MLP for gate
and up, a single linear itself. The module is called again as the block calls it on one batch.

Shapes: B sequences of a batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lqer.transforms.block_function import BlockFunction


class SiteOutput:
    """The outputs of the module around some linears of a block, on one batch (B, T, D) of the block's inputs.

    autocast: the dtype of the module's products, None for its own.
    """

    def __init__(self, call: BlockFunction, hidden_BTD: Tensor, linears: tuple[str, ...], autocast: torch.dtype | None):
        name = _closest_around(linears)
        self._module = call.block.get_submodule(name)
        self._prefix = f"{name}." if name else ""
        self._own = {name: parameter.detach() for name, parameter in self._module.named_parameters()}
        self._autocast = autocast
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        record = self._module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with record, _in_autocast(self._module, autocast):
            call({}, hidden_BTD)
        self._calls = calls
        self._originals = self._outputs({})

    def error(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The squared error of the output under other weights, by their names in the block: a float32 scalar."""
        inside = {name.removeprefix(self._prefix): weight for name, weight in weights.items()}
        pairs = zip(self._outputs(inside), self._originals, strict=True)
        return sum(((output - original).square().sum() for output, original in pairs), start=torch.zeros(()))

    def _outputs(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """The output of the one call, or none: an expert may not be sent anything."""
        inside = {name: weight.to(self._own[name].dtype) for name, weight in weights.items()}
        with _in_autocast(self._module, self._autocast):
            outputs = [functional_call(self._module, {**self._own, **inside}, *call) for call in self._calls]
        return [(output[0] if isinstance(output, tuple | list) else output).float() for output in outputs]


def _in_autocast(module: nn.Module, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(next(module.parameters()).device.type, dtype, enabled=dtype is not None)


def _closest_around(linears: tuple[str, ...]) -> str:
    """The name of the innermost module around all of the linears; the linear itself if there is one."""
    if len(linears) == 1:
        return linears[0]
    paths = [name.split(".")[:-1] for name in linears]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])
