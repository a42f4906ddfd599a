"""Clipping: scales fitted to a narrower range than a group's own, so that its bulk is rounded more finely.

A group with values in [lo, hi] gets the scales of [c_lo lo, c_hi hi], 0 < c <= 1; the weights do not change and
saturate. With c = 1 the scales are those of round-to-nearest. `search_clipping` is AWQ's automatic clipping (arXiv
2306.00978): one c per group, the best of a few under the error of the group's partial products

    mean over tokens (x_g · w_g - x_g · Q_c(w_g))²  =  (w_g - Q_c(w_g)) E[x_g x_gᵀ] (w_g - Q_c(w_g))ᵀ

which needs no tokens, only the diagonal blocks of the Hessian (block_statistics.py).

Queries and keys keep their range, as in AWQ: the error of their partial products says little about the softmax.

Shapes: S sequences, T tokens, D hidden size, O out_features, I in_features, N groups of a row, B sequences of a batch,
or values of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lqer.components import require_range
from lqer.formats import NumberFormat, QuantizedTensor
from lqer.formats.blocks import from_blocks, to_blocks
from lqer.transforms.base import Scheme
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_statistics import hessian_blocks
from lqer.transforms.block_transform import BlockTransform, Progress, SaveState, unsupported_scales
from lqer.transforms.cancelling import cancelling_linears
from lqer.transforms.tracing import enough_to_probe

# AWQ's: 1, 0.95, ... 0.55.
GRID = 20
SHRINK_FACTORS = tuple(1 - i / GRID for i in range(10))


@dataclass(frozen=True)
class Clip(BlockTransform):
    """`clip` as a configuration names it: the best of `steps` factors from 1 down, a twentieth apart."""

    kind = "clip"
    fixes_scales: ClassVar[bool] = True

    steps: int = len(SHRINK_FACTORS)

    def __post_init__(self) -> None:
        require_range("steps", self.steps, 1, GRID, self.kind)

    def unsupported_reason(self, scheme: Scheme) -> str | None:
        return unsupported_scales(scheme.weight, ("int", "mxint", "mx"))

    @torch.no_grad()
    def apply(
        self, problem: BlockProblem, result: BlockResult, progress: Progress, save_state: SaveState
    ) -> BlockResult:
        """Fix the scales of every linear to the clipped ranges with the smallest error."""
        progress(self.kind, 0, 1, None)
        found = search_block(problem, result, tuple(1 - i / GRID for i in range(self.steps)))
        rounded = {
            linear: quantize_clipped(
                result.weight(problem, linear), problem.formats[linear], found[linear], found[linear]
            )
            for linear in problem.formats
        }
        note = {linear: float(factor_ON.mean()) for linear, factor_ON in found.items()}
        return replace(result, rounded={**result.rounded, **rounded}).with_note(self.kind, note)


@torch.no_grad()
def search_block(problem: BlockProblem, result: BlockResult, factors: tuple[float, ...]) -> dict[str, Tensor]:
    """The best factor of every group of every linear, float32 (O, N); queries and keys get the first one."""
    kept = cancelling_linears(
        problem.call.without_rounding(), enough_to_probe(problem.inputs_STD[: problem.batch_size])
    )
    block_sizes = {linear: number_format.block_size for linear, number_format in problem.formats.items()}
    squares = hessian_blocks(problem, result.parameters, block_sizes)
    return {
        linear: search_clipping(
            result.weight(problem, linear), squares[linear], number_format, factors[:1] if linear in kept else factors
        )
        for linear, number_format in problem.formats.items()
    }


def group_range(weight_OI: Tensor, number_format: NumberFormat) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of every group, 0 included: float32 (O, N) each."""
    low_ON, high_ON = torch.aminmax(to_blocks(weight_OI.to(torch.float32), number_format.block_size), dim=-1)
    return low_ON.clamp(max=0), high_ON.clamp(min=0)


def quantize_clipped(
    weight_OI: Tensor, number_format: NumberFormat, low_factor_ON: Tensor, high_factor_ON: Tensor
) -> QuantizedTensor:
    """Round a weight to nearest under the scales of the narrowed ranges.

    The factors are in (0, 1]; a group of zeros has no range to narrow and stays zeros.
    """
    low_ON, high_ON = group_range(weight_OI, number_format)
    scales = number_format.fit(torch.stack([low_ON * low_factor_ON, high_ON * high_factor_ON], dim=-1))
    weight_ONB = to_blocks(weight_OI.to(torch.float32), number_format.block_size)
    codes_OI = from_blocks(number_format.encode(weight_ONB, scales), weight_OI.shape[1])
    return QuantizedTensor(number_format, tuple(weight_OI.shape), 1, {"codes": codes_OI, **scales})


def search_clipping(
    weight_OI: Tensor,
    blocks_NBB: Tensor,
    number_format: NumberFormat,
    factors: tuple[float, ...] = SHRINK_FACTORS,
) -> Tensor:
    """The best factor of every group: float32 (O, N).

    blocks_NBB: float32, the diagonal blocks of E[x xᵀ] up to scale, over all calibration tokens; a ragged last one is
    padded with zeros. Of equal factors the first wins.
    """
    weight_OI = weight_OI.to(torch.float32)
    best_ON = torch.full((len(weight_OI), len(blocks_NBB)), factors[0], dtype=torch.float32, device=weight_OI.device)
    smallest_ON = torch.full_like(best_ON, torch.inf)
    for factor in factors:
        factor_ON = torch.full_like(best_ON, factor)
        rounded_OI = quantize_clipped(weight_OI, number_format, factor_ON, factor_ON).dequantize()
        error_NOB = to_blocks(weight_OI - rounded_OI, number_format.block_size).transpose(0, 1)
        error_ON = ((error_NOB @ blocks_NBB) * error_NOB).sum(-1).T
        better_ON = error_ON < smallest_ON
        best_ON[better_ON] = factor
        smallest_ON = torch.where(better_ON, error_ON, smallest_ON)
    return best_ON
