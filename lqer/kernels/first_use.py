"""A kernel is compared with plain torch once, on the GPU that it is to run on, before it is trusted.

Kernels hold PTX of their own and count on how Triton assigns elements to threads. Another version of Triton, or another
card, can break that without an error: the first linear of every kind that a process loads is multiplied with random
tokens both ways. Every number of tokens that is tried may take seconds to compile, so who loads a model for calls of
one size says so.

Shapes: M tokens, I in_features, O out_features; P, H, F as in experts/module.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lqer.kernels.experts.module import GroupedExperts
from lqer.kernels.experts.reference import ACTIVATIONS, reference_down, reference_up
from lqer.kernels.fusion import Fused, Norm
from lqer.kernels.launch import makes_inputs, run_layer
from lqer.kernels.linear import packed_linear
from lqer.kernels.packed import PackedLinear
from lqer.kernels.reference import reference_linear

# One token, a whole tile of a tensor core, and what is dequantized first.
TOKENS = (1, 16, 256)
# Of experts: the smallest tile of pairs, some tiles of one expert, and the largest tile, sorted by a library.
TOKENS_OF_EXPERTS = (1, 16, 1024)
EXPERTS_OF_TOKEN = 2
# Relative to the norm of the outputs. Rounding to bfloat16 costs 2e-3; a wrong index costs 1.
MOST_ERROR = 0.02
_compared: set[Hashable] = set()
_tokens: Sequence[int] = TOKENS


@contextmanager
def calls_of(tokens: Sequence[int]) -> Iterator[None]:
    """Within, linears are compared with so many tokens: those of the calls that a model is loaded for."""
    global _tokens
    before, _tokens = _tokens, tokens
    try:
        yield
    finally:
        _tokens = before


def compare_once(packed: PackedLinear) -> None:
    """Compare the kernels of a linear on a GPU with the reference, unless a linear of its kind has been.

    A kind is all that decides which code runs, but sizes. Raises ArithmeticError if they disagree.
    """
    kind = _kind(packed)
    missing = [tokens for tokens in _tokens if (kind, tokens) not in _compared]
    if packed.workspace.is_cuda and missing:
        compare(packed, missing)
        _compared.update((kind, tokens) for tokens in missing)


def compare(packed: PackedLinear, counts: Sequence[int]) -> None:
    """Raise ArithmeticError if the kernels of a linear and the reference disagree on calls of so many tokens each."""
    generator = torch.Generator().manual_seed(0)
    for tokens in counts:
        x_MI = torch.randn(tokens, packed.spec.layout.columns, generator=generator)
        x_MI = x_MI.to(packed.workspace.device, packed.dtype)
        expected_MO = _own_outputs(reference_linear(x_MI, packed), packed).float()
        if not expected_MO.isfinite().all():
            continue  # float16 may not hold them, whoever computes
        found_MO = _own_outputs(packed_linear(x_MI, packed), packed)
        _check(found_MO, expected_MO, f"{packed.spec.layout} with {tokens} tokens")


def compare_fused_once(packed: PackedLinear) -> None:
    """The same, for one token, of a linear whose launches make its inputs and add a residual (fusion.py)."""
    kind, rotated = ("fused", _kind(packed)), packed.input_signs_I is not None
    if packed.workspace.is_cuda and makes_inputs(packed.spec, rotated, 1) and kind not in _compared:
        compare_fused(packed)
        _compared.add(kind)


def compare_fused(packed: PackedLinear) -> None:
    """Raise ArithmeticError if kernels and torch disagree on a token that is normed, or gated, before a linear."""
    generator, layout = torch.Generator().manual_seed(0), packed.spec.layout

    def random(length: int) -> Tensor:
        return torch.randn(1, length, generator=generator).to(packed.workspace.device, packed.dtype)

    h_1I, up_1I, residual_1O = random(layout.columns), random(layout.columns), random(layout.rows)
    norm = Norm(random(layout.columns)[0], 1e-5, 1.0)
    for name, fused in (
        ("a norm", Fused(norm, residual_1O)),
        ("a gate", Fused(None, residual_1O, up_1I)),
    ):
        expected_1O = fused.after(reference_linear(fused.before(h_1I), packed)).float()
        if expected_1O.isfinite().all():
            _check(run_layer(h_1I, packed, fused), expected_1O, f"{layout} behind {name}")


def _check(found: Tensor, expected: Tensor, what: str) -> None:
    error = ((found.float() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    if not error <= MOST_ERROR:
        raise ArithmeticError(
            f"kernels of {what} differ from plain torch by {error:.2g} of the outputs, more than {MOST_ERROR}"
        )


def _own_outputs(y_MO: Tensor, packed: PackedLinear) -> Tensor:
    """Without what lies between linears side by side: kernels that rotate outputs do not write there."""
    segments = packed.spec.segments
    return torch.cat([y_MO[:, segment.rows_of_all] for segment in segments], dim=1) if segments else y_MO


def compare_experts_once(grouped: GroupedExperts) -> None:
    """The same for the experts of a layer, of which the first few are sent tokens."""
    up, down = grouped.up.packed, grouped.down.packed
    words = up.part("words")
    kind = ("experts", grouped.gate, *(_kind(packed.linear(0, 0)) for packed in (up, down)))
    if words.is_cuda and kind not in _compared:
        compare_experts(grouped)
        _compared.add(kind)


def compare_experts(grouped: GroupedExperts) -> None:
    """Raise ArithmeticError if the kernels of experts and the reference disagree."""
    generator = torch.Generator().manual_seed(0)
    up, down = grouped.up.packed, grouped.down.packed
    device, few = up.part("words").device, min(up.experts, 4)

    def activate(halves_PHF: Tensor) -> Tensor:
        # Whatever the model does here: both are given the same.
        return ACTIVATIONS["silu"](halves_PHF).prod(dim=1)

    for tokens in TOKENS_OF_EXPERTS:
        x_MI = torch.randn(tokens, up.spec.layout.columns, generator=generator).to(device, up.dtype)
        chosen = torch.rand(tokens, few, generator=generator).topk(min(few, EXPERTS_OF_TOKEN)).indices.to(device)
        weights = torch.rand(chosen.shape, generator=generator).to(device)
        hidden, order_P, tiles_3P = reference_up(x_MI, chosen, up, down.spec, grouped.gate)
        hidden = hidden if grouped.gate else activate(hidden)
        expected_MO = reference_down(hidden, order_P, tiles_3P, chosen, weights, down, up.spec, True).float()
        if not expected_MO.isfinite().all():
            continue
        found_MO = grouped(x_MI, chosen, weights, activate)
        _check(found_MO, expected_MO, f"experts of {up.spec.layout} with {tokens} tokens")


def _kind(packed: PackedLinear) -> Hashable:
    spec = packed.spec
    layout = replace(spec.layout, rows=0, columns=0)
    rotated = packed.input_signs_I is not None
    joint = len(spec.segments) > 0
    return layout, spec.rank > 0, spec.rounding, packed.dtype, rotated, joint, packed.workspace.device
