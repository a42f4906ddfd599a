"""All experts of a layer as one module on packed tensors, and its two operators.

    hidden, order, tiles = torch.ops.lqer.experts_up(...)        pairs by expert, gate and up, activation
    y = torch.ops.lqer.experts_down(...)                         down, and the sum of a token's experts

Between them lies what the kernels do not compute of a model's activation, or nothing. On a GPU, and under
TRITON_INTERPRET=1, these are kernels; on a CPU plain torch.

Shapes: T tokens, K experts of a token, P = T K pairs, E experts, H halves, I in_features, O out_features, F outputs of
up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lqer.kernels.experts.launch import run_down, run_up
from lqer.kernels.experts.packed import NAMES, PackedExperts
from lqer.kernels.experts.reference import reference_down, reference_up
from lqer.kernels.runtime import INTERPRETED
from lqer.kernels.spec import Spec, decode_spec

# Activations of gate that the kernel computes.
GATES = ("silu", "gelu", "gelu_tanh")
# A longer prompt is multiplied part by part: partial sums and outputs of all pairs take memory.
TOKENS_AT_ONCE = 2048


class PackedStack(nn.Module):
    """The tensors of PackedExperts as buffers, which no state_dict holds: the checkpoint has them by expert."""

    def __init__(self, packed: PackedExperts):
        super().__init__()
        self._spec, self._dtype = packed.spec, packed.dtype
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def spec(self) -> Spec:
        return self._spec

    @property
    def packed(self) -> PackedExperts:
        return PackedExperts(self._spec, self._dtype, {name: self._buffers[name] for name in NAMES})

    def extra_repr(self) -> str:
        experts, halves = self.packed.experts, self.packed.halves
        return f"experts={experts}, halves={halves}, {self._spec.layout}, rank={self._spec.rank}, {self._spec.rounding}"


class GroupedExperts(nn.Module):
    """Experts of a layer in one launch for each of up and down.

    up: gate and up as halves, or up alone. gate: one of GATES for hidden = act(gate) * up; "" where `forward` is given
    what makes it of the halves.
    """

    def __init__(self, up: PackedExperts, down: PackedExperts, gate: str):
        super().__init__()
        self.up, self.down, self.gate, self.dtype = PackedStack(up), PackedStack(down), gate, up.dtype

    def forward(
        self, x_TI: Tensor, index_TK: Tensor, weights_TK: Tensor, activate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """y [T, O] in the dtype of x_TI, which is that of the packed tensors.

        index_TK: experts; what lies outside of 0 to E - 1 stands for none. activate: (P, H, F) -> (P, F), where
        `gate` is "".
        """
        if x_TI.dtype != self.dtype:
            raise ValueError(f"x must be in {self.dtype}, found {x_TI.dtype}")
        given = (tensor.split(TOKENS_AT_ONCE) for tensor in (x_TI, index_TK, weights_TK))
        parts = [self._forward(x, index, weights, activate) for x, index, weights in zip(*given, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _forward(
        self, x_TI: Tensor, index_TK: Tensor, weights_TK: Tensor, activate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        index_TK, up, down = index_TK.contiguous(), self.up._buffers, self.down._buffers
        hidden, order_P, tiles_3P = torch.ops.lqer.experts_up(
            x_TI, index_TK, *(up[name] for name in NAMES), self.up.spec.text, self.down.spec.text, self.gate
        )  # fmt: skip
        if not self.gate:
            hidden = activate(hidden)
        return torch.ops.lqer.experts_down(
            hidden, order_P, tiles_3P, index_TK, weights_TK.contiguous(), *(down[name] for name in NAMES),
            self.down.spec.text, self.up.spec.text, bool(self.gate),
        )  # fmt: skip


@torch.library.custom_op("lqer::experts_up", mutates_args=())
def _experts_up(
    x: Tensor,
    index: Tensor,
    words: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    a_codes: Tensor | None,
    a_exponents: Tensor | None,
    b_codes: Tensor | None,
    b_exponents: Tensor | None,
    spec: str,
    down: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `run_up`.

    spec, down: encode_spec of up and of down. The tensors are those of PackedExperts.
    """
    tensors = (words, high, scales, zeros, bias, a_codes, a_exponents, b_codes, b_exponents)
    packed = PackedExperts(decode_spec(spec), x.dtype, dict(zip(NAMES, tensors, strict=True)))
    run = run_up if x.is_cuda or INTERPRETED else reference_up
    return run(x, index, packed, decode_spec(down), gate)


@_experts_up.register_fake
def _(
    x, index, words, high, scales, zeros, bias, a_codes, a_exponents, b_codes, b_exponents, spec, down, gate
):  # fmt: skip
    pairs = index.shape[0] * index.shape[1]
    packed = PackedExperts(decode_spec(spec), x.dtype, {"words": words})
    return (
        x.new_empty(packed.outputs(pairs, decode_spec(down), gate)),
        x.new_empty((pairs,), dtype=torch.int32),
        x.new_empty((3, pairs), dtype=torch.int32),
    )


@torch.library.custom_op("lqer::experts_down", mutates_args=())
def _experts_down(
    hidden: Tensor,
    order: Tensor,
    tiles: Tensor,
    index: Tensor,
    weights: Tensor,
    words: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    a_codes: Tensor | None,
    a_exponents: Tensor | None,
    b_codes: Tensor | None,
    b_exponents: Tensor | None,
    spec: str,
    up: str,
    is_ready: bool,
) -> Tensor:
    """y [T, O]; see `run_down`. Arguments as of `experts_up`, which has made the first three."""
    tensors = (words, high, scales, zeros, bias, a_codes, a_exponents, b_codes, b_exponents)
    packed = PackedExperts(decode_spec(spec), hidden.dtype, dict(zip(NAMES, tensors, strict=True)))
    run = run_down if hidden.is_cuda or INTERPRETED else reference_down
    return run(hidden, order, tiles, index, weights, packed, decode_spec(up), is_ready)


@_experts_down.register_fake
def _(
    hidden, order, tiles, index, weights, words, high, scales, zeros, bias, a_codes, a_exponents, b_codes, b_exponents,
    spec, up, is_ready,
):  # fmt: skip
    return hidden.new_empty((index.shape[0], decode_spec(spec).layout.rows))
