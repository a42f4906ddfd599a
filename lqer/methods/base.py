"""What a method is given and what it returns, for one linear.

A method never sees a path, a configuration, a device map or another layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from lqer.formats import NumberFormat, QuantizedTensor

Statistic = Literal["mean_abs", "mean_square"]
Statistics = Mapping[str, Tensor]
FactorBlocks = Literal["reduction", "reference"]


@dataclass(frozen=True)
class LinearPlan:
    """How one linear is quantized; None stands for "stays in the model's dtype".

    `rank` may exceed what the weight admits: it is then taken as min(out_features, in_features). `factor_blocks` says
    along which dimension A and B are cut into blocks: "reduction", the one a GEMM sums over (A along in_features, B
    along the rank), or "reference", as the sweeps of LQER's paper ran (A along the rank, B along out_features).
    """

    method: str
    weight: NumberFormat
    activation: NumberFormat | None
    bias: NumberFormat | None
    rank: int
    factor: NumberFormat
    factor_blocks: FactorBlocks

    def plain(self) -> LinearPlan:
        """The same formats without reconstruction."""
        return replace(self, method="none", rank=0)

    def to_dict(self) -> dict[str, Any]:
        """What decides the outcome, by value: the names that a configuration gave its formats do not matter to it."""
        return {
            "method": self.method,
            "weight": self.weight.to_dict(),
            "activation": self.activation and self.activation.to_dict(),
            "bias": self.bias and self.bias.to_dict(),
            "low_rank": self.rank
            and {"rank": self.rank, "format": self.factor.to_dict(), "blocks": self.factor_blocks},
        }

    @property
    def factor_axes(self) -> tuple[int, int]:
        """The block axes of a_IR and b_RO."""
        return (0, 0) if self.factor_blocks == "reduction" else (1, 1)


@dataclass(frozen=True)
class LowRank:
    """The branch x·A·B: a_IR and b_RO as they are stored."""

    a_IR: QuantizedTensor
    b_RO: QuantizedTensor

    @property
    def rank(self) -> int:
        return self.a_IR.shape[1]

    @property
    def bits(self) -> int:
        return sum(factor.code_bits + factor.metadata_bits for factor in (self.a_IR, self.b_RO))


@dataclass(frozen=True)
class QuantizedWeight:
    """W ≈ W_q + (A·B)ᵀ: weight_OI in its number format, and the low-rank branch or None."""

    weight_OI: QuantizedTensor
    low_rank: LowRank | None

    def effective_weight(self) -> Tensor:
        """W_q + (A·B)ᵀ in float32, (out, in)."""
        weight_OI = self.weight_OI.dequantize()
        if self.low_rank is not None:
            weight_OI = weight_OI + (self.low_rank.a_IR.dequantize() @ self.low_rank.b_RO.dequantize()).T
        return weight_OI


@dataclass(frozen=True)
class Method:
    """A named composition: what it needs to know of the inputs, and what it does with one weight.

    propagate: whether the inputs are those of the original model's blocks or of the blocks quantized so far. Only in
    the first case can blocks be quantized in any order, and so in shares.
    """

    name: str
    reconstructs: bool
    statistics: frozenset[Statistic]
    scale: Callable[[Statistics], Tensor | None]
    quantize_linear: Callable[[Tensor, Statistics, LinearPlan], QuantizedWeight]
    propagate: Literal["original", "quantized"] = "original"
