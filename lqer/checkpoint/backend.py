"""The backend that runs a quantized checkpoint: emulation, or the Triton kernels.

Kernels read packed weights in the formats "mxint", "int", "codebook", "e8p" and "trellis", compute in bfloat16 or
float16, and need a GPU; emulation runs everything everywhere. Both give the same numbers up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from lqer.checkpoint.pack import FACTOR_ROLES
from lqer.errors import ModelError
from lqer.formats import NumberFormat, format_from_dict

Backend = Literal["emulate", "triton"]
BACKENDS = ("auto", "emulate", "triton")

Formats = tuple[NumberFormat, NumberFormat | None]


def resolve_backend(wanted: str, device: torch.device, dtype: torch.dtype, formats: Mapping[str, Formats]) -> Backend:
    """`wanted`, or for "auto" the kernels where they can run, but for those that run on request.

    formats: of weight and input, by linear. Raises ModelError, with the reason, where "triton" is wanted and cannot
    run.
    """
    if wanted == "emulate":
        return "emulate"
    reason = kernels_unsupported_reason(device, dtype, formats)
    if reason is None:
        return "triton"
    if wanted == "triton":
        raise ModelError(f'evaluation.backend: "triton" cannot run here: {reason}')
    return "emulate"


def choose_backend(
    wanted: str, device: torch.device, dtype: torch.dtype, linears: Mapping[str, Mapping[str, Any]]
) -> Backend:
    """The backend that runs these linears, by their entries of lqer.json. Raises ModelError as `resolve_backend`."""
    if wanted == "auto" and any(FACTOR_ROLES[0] in entry for entry in linears.values()):
        return "emulate"  # kernels do not support fine-tuned factors
    return resolve_backend(wanted, device, dtype, {name: formats_of(entry) for name, entry in linears.items()})


def formats_of(entry: Mapping[str, Any]) -> tuple[NumberFormat, NumberFormat | None]:
    """The number formats of a linear's weight and of its input. Raises ModelError where a plug-in's are not loaded."""
    described = [entry["weight"]["format"], *([entry["activation"]] if "activation" in entry else [])]
    for kind in (one["kind"] for one in described):
        if kind not in NumberFormat.registry:
            raise ModelError(f"number format {kind!r} is unknown: load its plug-in first (--plugin, load_plugin)")
    weight, *activation = map(format_from_dict, described)
    return weight, activation[0] if activation else None


def kernels_unsupported_reason(device: torch.device, dtype: torch.dtype, formats: Mapping[str, Formats]) -> str | None:
    """Why the kernels cannot run linears of these formats; None where they can."""
    if device.type != "cuda":
        return f"it needs a GPU, and the device is {device.type}"
    try:
        from lqer.kernels import DTYPES, activation_rounding, check_weight
    except ImportError as error:
        return f"triton is not usable ({error})"
    if dtype not in DTYPES:
        return f"it computes in bfloat16 or float16, and the dtype is {str(dtype).removeprefix('torch.')}"
    checked: set[Formats] = set()
    for name, (weight, activation) in formats.items():
        if (weight, activation) in checked:
            continue
        checked.add((weight, activation))
        try:
            check_weight(weight)
            activation_rounding(activation)
        except ValueError as error:
            return f"{name}: {error}"
    return None
