"""The linears of all experts of a layer, packed for one launch: their tensors, stacked.

Shapes: E experts, H halves (gate and up, or one linear), I in_features, O out_features, R rank; P means padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.kernels.layout.codes import Layout
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.packed import PackedLinear, weight_of
from lqer.kernels.spec import Spec

# In the order in which operators take them.
NAMES = ("words", "high", "scales", "zeros", "bias", "a_codes", "a_exponents", "b_codes", "b_exponents")
# Whose first axis is the rank.
RANKED = {"a_codes": 1, "a_exponents": 1, "b_codes": 1, "b_exponents": 0}


@dataclass(frozen=True)
class PackedExperts:
    """Linears of one Spec: the tensors of PackedLinear, each with the axes [E, H] in front; None where those are."""

    spec: Spec
    dtype: torch.dtype
    tensors: dict[str, Tensor | None]

    @property
    def experts(self) -> int:
        return len(self.part("words"))

    @property
    def halves(self) -> int:
        return self.part("words").shape[1]

    def outputs(self, pairs: int, down: Spec, gate: str) -> tuple[int, ...]:
        """The shape of what these give for so many pairs: what `down` reads with a gate (P, I), else (P, H, O)."""
        if not gate:
            return pairs, self.halves, self.spec.layout.rows
        whole = isinstance(down.layout, GroupLayout)
        return pairs, down.layout.padded_columns if whole else down.layout.columns

    def part(self, name: str) -> Tensor:
        """A tensor that is not None."""
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    @classmethod
    def stack(cls, linears: Sequence[Sequence[PackedLinear]]) -> PackedExperts:
        """Stack linears [E, H] that differ in their values and ranks alone; ranks are padded to the largest with zeros.

        Raises ValueError, with the reason, for any others, and for weights other than integer codes.
        """
        each = [linear for halves in linears for linear in halves]
        rank = max(linear.spec.rank for linear in each)
        first = each[0]
        if not isinstance(first.spec.layout, Layout | GroupLayout):
            raise ValueError(f"experts are multiplied together on integer codes, found {first.spec.layout}")
        spec = next(linear.spec for linear in each if linear.spec.rank == rank)
        tensors: dict[str, Tensor | None] = {}
        for linear in each:
            if (
                replace(linear.spec, rank=rank) != spec
                or linear.dtype != first.dtype
                or (not linear.spec.rank and rank)
            ):
                raise ValueError(f"linears of experts differ: {linear.spec} and {spec}")
        for name in NAMES:
            parts = [_to_rank(name, linear, rank) for linear in each]
            present = [part for part in parts if part is not None]
            if present and len(present) < len(parts):
                raise ValueError(f"linears of experts differ: not all have {name}")
            tensors[name] = torch.stack(present).unflatten(0, (len(linears), -1)) if present else None
        return cls(spec, first.dtype, tensors)

    def linear(self, expert: int, half: int) -> PackedLinear:
        """One of the linears, on views, without a workspace: for plain torch."""
        at = {name: None if part is None else part[expert, half] for name, part in self.tensors.items()}
        words, scales = self.part("words")[expert, half], self.part("scales")[expert, half]
        weight = weight_of(self.spec.layout, words, at["high"], scales, at["zeros"])
        workspace = words.new_empty(0)
        return PackedLinear(
            self.spec, self.dtype, weight, at["bias"], at["a_codes"], at["a_exponents"], at["b_codes"],
            at["b_exponents"], workspace,
        )  # fmt: skip


def _to_rank(name: str, linear: PackedLinear, rank: int) -> Tensor | None:
    """A tensor of a linear, of a factor with `rank` ranks."""
    part = linear.tensors().get(name)
    if part is None or name not in RANKED:
        return part
    rows = rank if RANKED[name] or name == "b_codes" else rank // linear.spec.b_block
    return pad(part, (0, 0, 0, rows - len(part)))
