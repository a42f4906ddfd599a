"""Modules of linears that read the same input and run as one launch: q, k and v of attention, gate and up of an MLP.

Each linear stays a module of its own under its own name, with its own tensors in the state_dict; these are views of the
joint tensors (joint.py), so nothing is stored twice. What the modules share is a plain object that no module owns,
`Siblings`. The first module that is called with a tensor computes the outputs of all; the others, called with that very
tensor, take theirs. "That very" is identity of the tensor object and of its version, the same rule by which calibration
finds the linears of a site, so every call gives what the linear alone would give, in whatever order and however often
modules are called: an output is handed out once, and any other call computes anew. Once all are handed out, nothing
refers to the input and to the outputs any more. In inference mode, and while torch.compile traces, tensors have no
version: a tensor that is changed in place between the calls of a site would not be noticed. The run that found the site
showed that the model does not do so.

The rule needs nothing of the modules around, so no attention or MLP is rewritten. torch.compile follows it while it
traces, and leaves one call of the operator in the graph; a CUDA graph records what ran.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lqer.kernels.first_use import compare_once
from lqer.kernels.joint import join, part_of
from lqer.kernels.module import TritonLinear


class SiblingLinear(TritonLinear):
    """One of several linears that are computed together."""

    def __init__(self, linear: TritonLinear, siblings: Siblings, place: int):
        super().__init__(linear.packed)
        self._siblings, self._place = siblings, place

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) in the packed dtype -> (..., out_features), a view of the outputs of all."""
        return self._siblings.output_of(self._place, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiblingLinear:
        """What .to(), .cuda() and the like call. The joint tensors follow the first of the linears."""
        super()._apply(fn, recurse)
        self._siblings.follow(self, fn)
        return self


class Siblings:
    """The linears of one input, and what they leave for each other between their calls."""

    def __init__(self, linears: Sequence[TritonLinear]):
        """linears: whose packed linears `can_join`."""
        # Not a child of any module: its tensors would count twice.
        self.joint = TritonLinear(join([linear.packed for linear in linears]))
        compare_once(self.joint.packed)
        self.linears = [SiblingLinear(linear, self, place) for place, linear in enumerate(linears)]
        self._rows = [segment.rows_of_all for segment in self.joint.spec.segments]
        self._x: Tensor | None = None
        self._version = 0
        self._y: Tensor | None = None
        self._handed_out = 0  # a bit for each linear
        self._share()

    def output_of(self, place: int, x: Tensor) -> Tensor:
        """The output of a linear for x, computed now or by the call of a sibling before."""
        version, own = _version_of(x), 1 << place
        if self._y is None or self._x is not x or self._version != version or self._handed_out & own:
            self._x, self._version, self._y, self._handed_out = x, version, self.joint(x), 0
        y = self._y[..., self._rows[place]]
        self._handed_out |= own
        if self._handed_out == (1 << len(self._rows)) - 1:
            self._x, self._y, self._handed_out, self._version = None, None, 0, 0
        return y

    def follow(self, linear: SiblingLinear, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply to the joint tensors what was applied to those of the first linear; then share them again."""
        if linear is self.linears[0]:
            self.joint._apply(fn)
        self._share()

    def _share(self) -> None:
        """Make the tensors of every linear that are where the joint ones are views of these."""
        joint = self.joint.packed
        for place, linear in enumerate(self.linears):
            parts = part_of(joint, place, linear.spec)
            # One that has no bias itself keeps none, although the joint one has zeros there.
            for name, own in list(linear.named_buffers(recurse=False)):
                if own.device == parts[name].device:
                    linear._buffers[name] = parts[name]


def _version_of(x: Tensor) -> int:
    """Counts changes of x in place; 0 where nobody counts them: in inference mode, and while torch.compile traces."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version
