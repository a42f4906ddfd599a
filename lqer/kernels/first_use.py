"""A kernel is compared with plain torch once, on the GPU that it is to run on, before it is trusted.

Kernels hold PTX of their own and count on how Triton assigns elements to threads. Another version of Triton, or another
card, can break that without an error: the first linear of every kind that a process loads is multiplied with random
tokens both ways.

Shapes: M tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch

from lqer.kernels.linear import packed_linear
from lqer.kernels.packed import PackedLinear
from lqer.kernels.reference import reference_linear

# One token, a whole tile of a tensor core, and what is dequantized first.
TOKENS = (1, 16, 256)
# Relative to the norm of the outputs. Rounding to bfloat16 costs 2e-3; a wrong index costs 1.
MOST_ERROR = 0.02
_compared: set[Hashable] = set()


def compare_once(packed: PackedLinear) -> None:
    """Compare the kernels of a linear on a GPU with the reference, unless a linear of its kind has been.

    A kind is all that decides which code runs, but sizes. Raises ArithmeticError if they disagree.
    """
    kind = _kind(packed)
    if packed.workspace.is_cuda and kind not in _compared:
        compare(packed)
        _compared.add(kind)


def compare(packed: PackedLinear) -> None:
    """Raise ArithmeticError if the kernels of a linear and the reference disagree."""
    generator = torch.Generator().manual_seed(0)
    for tokens in TOKENS:
        x_MI = torch.randn(tokens, packed.spec.layout.columns, generator=generator)
        x_MI = x_MI.to(packed.workspace.device, packed.dtype)
        expected_MO = reference_linear(x_MI, packed).float()
        if not expected_MO.isfinite().all():
            continue  # float16 may not hold them, whoever computes
        difference_MO = packed_linear(x_MI, packed).float() - expected_MO
        error = (difference_MO.norm() / expected_MO.norm().clamp_min(1e-30)).item()
        if not error <= MOST_ERROR:
            raise ArithmeticError(
                f"kernels of {packed.spec.layout} with {tokens} tokens differ from plain torch by {error:.2g} of the "
                f"outputs, more than {MOST_ERROR}"
            )


def _kind(packed: PackedLinear) -> Hashable:
    spec = packed.spec
    layout = replace(spec.layout, rows=0, columns=0)
    rotated = packed.input_signs_I is not None
    return layout, spec.rank > 0, spec.rounding, packed.dtype, rotated, packed.workspace.device
