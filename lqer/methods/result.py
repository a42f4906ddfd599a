"""What a method makes of one weight: W ≈ W_q + (A·B)ᵀ, as it is stored.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lqer.formats import QuantizedTensor
from lqer.transforms import Rotation


@dataclass(frozen=True)
class LowRank:
    """The branch x·A·B: a_IR and b_RO as they are stored, and the solver's measures of them.

    captured_energy: the captured fraction of the energy of the target (the rounding error, or the weight where the
    method starts with the low-rank part), under the method's metric, before A and B were rounded; after, where they
    were fitted rounded. gap: the estimated fraction that the optimum captures in addition; None where the solver is
    exact.
    """

    a_IR: QuantizedTensor
    b_RO: QuantizedTensor
    captured_energy: float
    gap: float | None

    @property
    def rank(self) -> int:
        return self.a_IR.shape[1]

    @property
    def bits(self) -> int:
        return sum(factor.code_bits + factor.metadata_bits for factor in (self.a_IR, self.b_RO))

    def product(self) -> Tensor:
        """(A·B)ᵀ in float32, (out, in)."""
        return (self.a_IR.dequantize() @ self.b_RO.dequantize()).T


@dataclass(frozen=True)
class QuantizedWeight:
    """W ≈ W_q + (A·B)ᵀ: weight_OI in its number format, and the low-rank branch or None.

    rotation: the one that all of them are rotated by, or None. errors: of an alternation, the relative error
    sqrt(tr(F H Fᵀ) / tr(W H Wᵀ)) after every step. damping_raises: how often H was not positive definite, and was
    damped more, in an alternation.
    """

    weight_OI: QuantizedTensor
    low_rank: LowRank | None
    rotation: Rotation | None = None
    errors: tuple[float, ...] = ()
    damping_raises: int = 0

    def rounded_weight(self) -> Tensor:
        """W_q in float32, rotated back, (out, in)."""
        return self._rotated_back(self.weight_OI.dequantize())

    def effective_weight(self) -> Tensor:
        """W_q + (A·B)ᵀ in float32, rotated back, (out, in)."""
        weight_OI = self.weight_OI.dequantize()
        return self._rotated_back(weight_OI if self.low_rank is None else weight_OI + self.low_rank.product())

    def _rotated_back(self, weight_OI: Tensor) -> Tensor:
        return weight_OI if self.rotation is None else self.rotation.inverse_weight(weight_OI)

    @property
    def metadata_bits(self) -> int:
        """Bits of everything stored apart from the weight's codes and the low-rank factors."""
        return self.weight_OI.metadata_bits + self.sign_bits

    @property
    def sign_bits(self) -> int:
        """The part of them that is the signs of a rotation."""
        return 0 if self.rotation is None else self.rotation.bits
