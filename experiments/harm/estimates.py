"""What the divergence of given errors is by estimate, from gradients of the original (lqer/stages/measure_widths.py).

Shapes: W windows, T tokens of a window, B windows of a call, N tokens of each, S stretches, I in_features, O
out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from harm.subject import SEED, Subject
from lqer.models.backward import walk_backward

# Tokens whose errors are summed before they are squared: one, a stretch, a window.
STRETCHES = (1, 64, None)


def estimates(subject: Subject, errors: Mapping[str, Tensor], windows_WT: Tensor) -> dict[str, list[float]]:
    """½ Σ over stretches of tokens, Σ_o (Σ_t g_to (E x_t)_o)² / tokens, of each linear, in the order of STRETCHES.

    errors: E (O, I) by the name of a weight.
    """
    found: dict[str, list[float]] = {}
    for run in walk_backward(subject.opened, windows_WT, subject.text.batch_size, SEED):
        prefix = f"{run.run.name}."
        own = {name: error_OI for name, error_OI in errors.items() if name.startswith(prefix)}
        sums = {name: torch.zeros(len(STRETCHES), dtype=torch.float64, device=run.run.device) for name in own}
        run.backward({
            name.removeprefix(prefix).removesuffix(".weight"): partial(_add, sums[name], error_OI)
            for name, error_OI in own.items()
        })  # fmt: skip
        found |= {name: (0.5 * sums_S / windows_WT.numel()).tolist() for name, sums_S in sums.items()}
    return found


def _add(sums_S: Tensor, error_OI: Tensor, x_BNI: Tensor, g_BNO: Tensor) -> None:
    products_BNO = (x_BNI.float() @ error_OI.float().T) * g_BNO.float()
    tokens = products_BNO.shape[1]
    for i, stretch in enumerate(min(one or tokens, tokens) for one in STRETCHES):
        whole_BNO = functional.pad(products_BNO, (0, 0, 0, -tokens % stretch))
        sums_S[i] += whole_BNO.unflatten(1, (-1, stretch)).sum(2).square().sum(dtype=torch.float64)
