"""Values stored in a floating-point dtype: the format of an operand that is not quantized.

Shapes: L length of the axis, G rows of all leading dims, g values of a row.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lqer.components import require_choice
from lqer.formats.base import NumberFormat, check_finite

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Passthrough(NumberFormat):
    """Values rounded to `dtype` (half to even) and stored as such; parts: "codes" [*lead, L] of that dtype.

    `quantize` raises NonFiniteError where float16 overflows, `fake_quantize` then gives infinity.
    """

    kind = "passthrough"
    trainable_parts: ClassVar[frozenset[str]] = frozenset({"codes"})

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    block_size: Literal["row"] = "row"

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, list(DTYPES), "passthrough")
        require_choice("block_size", self.block_size, ["row"], "passthrough")

    @property
    def stream_widths(self) -> dict[str, int]:
        return {}

    def bits_per_value(self, length: int) -> float:
        return DTYPES[self.dtype].itemsize * 8

    def trainable_values(self, rows: int, length: int) -> int:
        return rows * length

    def fit(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """No scales."""
        return {}

    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """The values in `dtype`, never sharing memory with `x_Gg`."""
        return x_Gg.to(DTYPES[self.dtype], copy=True)

    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """The values in float32."""
        return codes_Gg.to(torch.float32)

    def quantize_parts(self, x_L: Tensor) -> dict[str, Tensor]:
        parts = super().quantize_parts(x_L)
        check_finite(parts["codes"])
        return parts
