"""What is reported of one quantized linear: its row of layers-*.json, and the singular values of its error.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lqer.lowrank.exact import singular_values
from lqer.lowrank.metric import Metric
from lqer.lowrank.scaling import activation_scale
from lqer.methods import LinearPlan, QuantizedWeight
from lqer.nn.linear import output_error, weight_error
from lqer.phases import in_phase


@in_phase("errors and spectra")
def rounded_alone(
    weight_OI: Tensor, weight: QuantizedWeight, statistics: Mapping[str, Tensor], plan: LinearPlan
) -> Tensor:
    """The weight after rounding alone: the stored W_q, unless that was rounded with a low-rank part subtracted."""
    if weight.low_rank is None or plan.method.rounds_the_weight_itself(plan):
        return weight.rounded_weight()
    return plan.without_low_rank().quantize(weight_OI, statistics).rounded_weight()


def later_spectra(
    name: str, weight_OI: Tensor, rounded_OI: Tensor, statistics: Mapping[str, Tensor], at_once: bool = False
) -> Callable[[], dict[str, Tensor]]:
    """A function that finds the singular values of the weight and of its rounding error, by the names in their file.

    It may be called in another thread: a GPU works in a stream of its own, behind what was launched before now. On a
    CPU, and with at_once, they are found now, and the matrices need not be held.
    """
    mean_abs_I = statistics["mean_abs"]
    if at_once or not weight_OI.is_cuda:
        found = spectra(name, weight_OI, rounded_OI, mean_abs_I)
        return lambda: found
    _load_solvers(weight_OI.device)
    ready = torch.cuda.current_stream(weight_OI.device).record_event()

    def find() -> dict[str, Tensor]:
        with torch.cuda.stream(_side_stream(weight_OI.device)):
            ready.wait()
            return {key: values.cpu() for key, values in spectra(name, weight_OI, rounded_OI, mean_abs_I).items()}

    return find


@cache
def _load_solvers(device: torch.device) -> None:
    """Have PyTorch load its solvers, which it does at their first use: it fails where two threads are the first."""
    torch.linalg.eigvalsh(torch.ones(1, 1, dtype=torch.float64, device=device))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@in_phase("errors and spectra")
def spectra(name: str, weight_OI: Tensor, rounded_OI: Tensor, mean_abs_I: Tensor) -> dict[str, Tensor]:
    """Singular values of the weight and of its rounding error, by the names that they are stored under."""
    error_OI, scale_I = weight_OI - rounded_OI, activation_scale(mean_abs_I)
    return {
        f"{name}.weight": singular_values(weight_OI, Metric()),
        f"{name}.plain": singular_values(error_OI, Metric()),
        f"{name}.scaled": singular_values(error_OI, Metric(scale_I=scale_I)),
    }


@in_phase("errors and spectra")
def layer_row(
    name: str, weight_OI: Tensor, rounded_OI: Tensor, weight: QuantizedWeight, statistics: Mapping[str, Tensor]
) -> dict[str, Any]:
    """One row of layers.csv; bits are totals here, of everything that is stored for the linear's weight.

    Errors are still scalar tensors on the device (`with_numbers`).
    """
    sample = statistics["sample"]
    before = after = weight_error(weight_OI, rounded_OI), output_error(weight_OI, rounded_OI, sample)
    if weight.low_rank is not None:
        effective_OI = weight.effective_weight()
        after = weight_error(weight_OI, effective_OI), output_error(weight_OI, effective_OI, sample)
    return {
        "name": name,
        "out_features": weight_OI.shape[0],
        "in_features": weight_OI.shape[1],
        "rank": weight.low_rank.rank if weight.low_rank else 0,
        "weight_bits": weight.weight_OI.code_bits,
        "metadata_bits": weight.metadata_bits,
        "codebook_bits": weight.weight_OI.codebook_bits,
        "zero_bits": weight.weight_OI.zero_bits,
        "sign_bits": weight.sign_bits,
        "low_rank_bits": weight.low_rank.bits if weight.low_rank else 0,
        "captured_energy": weight.low_rank.captured_energy if weight.low_rank else None,
        "solver_gap": weight.low_rank.gap if weight.low_rank else None,
        "step_errors": list(weight.errors),
        "damping_raises": weight.damping_raises,
        "weight_error_before": before[0],
        "weight_error": after[0],
        "output_error_before": before[1],
        "output_error": after[1],
    }


def with_numbers(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with Python numbers in place of scalar tensors, all read at once: every read waits for a GPU."""
    found = [dict(row) for row in rows]
    places = [(row, key) for row in found for key, value in row.items() if isinstance(value, Tensor)]
    numbers = torch.stack([row[key] for row, key in places]).tolist() if places else []
    for (row, key), number in zip(places, numbers, strict=True):
        row[key] = number
    return found
