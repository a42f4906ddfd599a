"""One quantized linear on its way from a checkpoint's tensors to the module that runs it.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lqer.checkpoint.backend import Backend
from lqer.checkpoint.pack import FACTOR_ROLES, packed_parts, unpack_role
from lqer.errors import ModelError
from lqer.formats import E8P, NumberFormat, QuantizedTensor, Trellis, format_from_dict
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.transforms import Hadamard, transform_from_dict
from lqer.transforms.hadamard import RandomHadamard


@dataclass(frozen=True, eq=False)
class LinearTensors:
    """y = W_q x_q + b + Q(Q(x_q A) B), or that between the rotations of x and y, in number formats.

    weight (O, I); factors by FACTOR_ROLES: A (I, R) in up to two pieces side by side, B (R, O) in as many, one below
    the other; bias_O (O,) in any float dtype; activation: Q; rotation: of the basis that weight and factors are in.
    """

    weight: QuantizedTensor
    factors: Mapping[str, QuantizedTensor]
    bias_O: Tensor | None
    activation: NumberFormat | None
    rotation: RandomHadamard | None

    def module(self, backend: Backend, dtype: torch.dtype) -> nn.Module:
        """The backend's module, computing in `dtype`. Raises ModelError, with the reason, where it cannot run this."""
        rotation = None if self.rotation is None else self.rotation.to(dtype)
        bias_O = None if self.bias_O is None else self.bias_O.to(dtype)
        if rotation is None or (backend == "triton" and isinstance(self.weight.format, E8P | Trellis)):
            return self._run_by(backend, dtype, bias_O, rotation)
        return HadamardLinear(self._run_by(backend, dtype, None, None), rotation, bias_O)

    def _run_by(
        self, backend: Backend, dtype: torch.dtype, bias_O: Tensor | None, rotation: RandomHadamard | None
    ) -> nn.Module:
        """rotation: only if a kernel applies it."""
        if backend == "triton":
            from lqer.kernels import PackedLinear, TritonLinear, compare_once

            if "first_a" in self.factors:
                raise ModelError('kernels do not support fine-tuned low-rank factors; use backend = "emulate"')
            a_IR, b_RO = self.factors.get("low_rank_a"), self.factors.get("low_rank_b")
            try:
                packed = PackedLinear.pack(self.weight, a_IR, b_RO, bias_O, self.activation, dtype, rotation)
                compare_once(packed)
            except ValueError as error:
                raise ModelError(str(error)) from None
            except ArithmeticError as error:
                raise ModelError(f'{error}; use backend = "emulate"') from None
            return TritonLinear(packed)
        return QuantizedLinear(self.weight.dequantize(dtype), bias_O, *self.merged_factors(dtype), self.activation)

    def merged_factors(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The values of A (I, R) and B (R, O), both pieces of each."""
        pieces = {role: factor.dequantize(dtype) for role, factor in self.factors.items()}
        a = [pieces[role] for role in ("first_a", "low_rank_a") if role in pieces]
        b = [pieces[role] for role in ("first_b", "low_rank_b") if role in pieces]
        return (torch.cat(a, dim=1), torch.cat(b, dim=0)) if pieces else (None, None)


def read_linear(
    tensors: Mapping[str, Tensor], name: str, entry: Mapping[str, Any], device: torch.device
) -> LinearTensors:
    """One linear from packed tensors by full names, on the device; entry: that of lqer.json."""
    bias = unpack_role(tensors, name, "bias", entry, device)
    bias_O = None if bias is None else bias.dequantize()
    if bias is None and f"{name}.bias" in tensors:
        bias_O = tensors[f"{name}.bias"].to(device)
    stored = {role: unpack_role(tensors, name, role, entry, device) for role in ("weight", *FACTOR_ROLES)}
    weight = stored.pop("weight")
    assert weight is not None
    rotation = None
    if "transform" in entry:
        transform = transform_from_dict(entry["transform"])
        assert isinstance(transform, Hadamard)
        rotation = transform.unpack(packed_parts(tensors, f"{name}.transform.", device), *weight.shape)
    return LinearTensors(
        weight,
        {role: factor for role, factor in stored.items() if factor is not None},
        bias_O,
        format_from_dict(entry["activation"]) if "activation" in entry else None,
        rotation,
    )


def build_linear(
    tensors: Mapping[str, Tensor],
    name: str,
    entry: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> nn.Module:
    """The backend's module of one linear; arguments as of `read_linear` and `LinearTensors.module`."""
    linear = read_linear(tensors, name, entry, device)
    try:
        return linear.module(backend, dtype)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
