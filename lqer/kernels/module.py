"""The quantized linear as a module on packed tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqer.kernels.launch import prepare_tables
from lqer.kernels.linear import packed_linear
from lqer.kernels.packed import PackedLinear, weight_of
from lqer.kernels.spec import Spec


class TritonLinear(nn.Module):
    """`packed_linear` as a module. Its tensors are buffers: .to(device) moves them, and a state_dict holds them."""

    words: Tensor
    scales: Tensor
    workspace: Tensor

    def __init__(self, packed: PackedLinear):
        super().__init__()
        layout = packed.spec.layout
        self.in_features, self.out_features = layout.columns, layout.rows
        self._spec, self._dtype = packed.spec, packed.dtype
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        prepare_tables(packed)

    @property
    def spec(self) -> Spec:
        return self._spec

    @property
    def packed(self) -> PackedLinear:
        """The linear with the module's current buffers."""

        def get(name: str) -> Tensor | None:
            return self._buffers.get(name)

        weight = weight_of(self._spec.layout, self.words, get("high"), self.scales, get("zeros"))
        return PackedLinear(
            self._spec, self._dtype, weight, get("bias"), get("a_codes"), get("a_exponents"), get("b_codes"),
            get("b_exponents"), self.workspace, get("input_signs"), get("output_signs"),
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """Of the weight's shape and dtype, without values: some models read the dtype off their linears."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) in the packed dtype -> (..., out_features)."""
        return packed_linear(x, self.packed)

    def extra_repr(self) -> str:
        spec = self._spec
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={spec.rank}, {spec.rounding}"
