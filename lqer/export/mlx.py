"""A folder in MLX's layout, for mlx_lm on Apple's chips: value = code * scale + bias, in groups of 32, 64 or 128.

    number format                    tensors of a linear
    int, mxint, mx mxint8,           weight uint32 [O, I b / 32], scales [O, G], biases [O, G] = -zero * scale
    of 2, 3, 4, 5, 6 or 8 bits
    mx mxfp4_e2m1, mxfp8_e4m3        weight uint32, scales uint8 [O, I / 32], no biases; mode "mxfp4" or "mxfp8"

The packed codes are those of the checkpoint. Powers of two are stored in bfloat16, other scales in float32, in which
those that the checkpoint has in half precision are exact, and their biases too; `scale_dtype` rounds both. Linears may
differ in bits and groups: config.json names those that differ from most.

Shapes: I in_features, O out_features, G groups of a row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lqer.components import require_choice
from lqer.export.base import Target, Written, load_weights, unsupported_extras, unsupported_transposed
from lqer.export.integers import integers_of, unsupported_integers, words
from lqer.export.shards import write_linears
from lqer.export.source import CONFIG_FILE, Linear, LinearSpec, Outline, Source
from lqer.formats import MX
from lqer.formats.blocks import block_width
from lqer.models.reading import read_file
from lqer.models.source import DTYPES

BITS = (2, 3, 4, 5, 6, 8)
# The fewest scales first.
GROUPS = (128, 64, 32)
MX_GROUP = 32
MODES = {"mxfp4_e2m1": "mxfp4", "mxfp8_e4m3": "mxfp8"}
# The key of config.json, and of the parts of a linear.
QUANTIZATION = "quantization"
SCALES, BIASES = "scales", "biases"


@dataclass(frozen=True)
class Mlx(Target):
    """MLX's layout, for mlx_lm. scale_dtype: dtype of scales and biases, by default one that holds them exactly."""

    kind = "mlx"
    readers = ("mlx",)
    library_name = "mlx"
    tags = ("mlx",)

    scale_dtype: Literal["float16", "bfloat16", "float32"] | None = None

    def __post_init__(self) -> None:
        require_choice("scale_dtype", self.scale_dtype, [None, *DTYPES], self.kind)

    def unsupported(self, spec: LinearSpec) -> str | None:
        if (reason := unsupported_extras(spec)) is not None:
            return reason
        if _mode(spec) is not None:
            return None if spec.format.block_size == MX_GROUP else f"MX floats are stored in blocks of {MX_GROUP}"
        if (reason := unsupported_integers(spec.format)) is not None:
            return reason
        if (bits := spec.format.stream_widths["codes"]) not in BITS:
            return f"{bits} bits are not one of {', '.join(map(str, BITS))}"
        if _group(spec) is None:
            groups = ", ".join(map(str, GROUPS))
            return f"no group of {groups} divides its {spec.in_features} inputs and blocks of {spec.format.block_size}"
        return None

    def unsupported_model(self, model: Outline) -> tuple[str, str] | None:
        return unsupported_transposed(model)

    def write(self, source: Source, folder: Path) -> Written:
        are_exact: list[bool] = []

        def tensors_of(linear: Linear) -> dict[str, Tensor]:
            tensors, is_exact = mlx_tensors(linear, self.scale_dtype and DTYPES[self.scale_dtype])
            are_exact.append(is_exact)
            return tensors

        write_linears(source, folder, tensors_of, {QUANTIZATION: quantization(source.specs)})
        if all(are_exact):
            return Written("exact")
        return Written("rounded", (f"Scales and biases were rounded once more, to {self.scale_dtype or 'float32'}.",))

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        described = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))[QUANTIZATION]
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= dequantized(file, described)
        return load_weights(folder, weights, dtype)

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        return {"mlx_lm": f'mlx_lm.generate --model {folder} --prompt "Once upon a time"'}


def mlx_tensors(linear: Linear, scale_dtype: torch.dtype | None) -> tuple[dict[str, Tensor], bool]:
    """The tensors of one weight by the last part of their names, and whether they hold it without loss."""
    spec, parts = linear.spec, linear.weight_OI.parts
    if _mode(spec) is not None:
        bits = spec.format.stream_widths["codes"]
        return {"weight": words(parts["codes"], bits).view(torch.uint32), SCALES: parts["exponents"]}, True
    integers = integers_of(linear.weight_OI).regrouped(_group(spec))
    scales_OG = integers.scales_OG.double()
    exact = {SCALES: scales_OG, BIASES: -(integers.zeros_OG * scales_OG)}
    stored = {part: values_OG.to(scale_dtype or integers.scale_dtype) for part, values_OG in exact.items()}
    is_exact = all(torch.equal(stored[part].double(), exact[part]) for part in exact)
    return {"weight": words(integers.codes_OI, integers.bits).view(torch.uint32), **stored}, is_exact


def quantization(specs: Mapping[str, LinearSpec]) -> dict[str, Any]:
    """The entry of config.json: what most linears have, and the others by name."""
    schemes = {name: tuple(_scheme(spec).items()) for name, spec in specs.items()}
    commonest = Counter(schemes.values()).most_common(1)[0][0]
    return dict(commonest) | {name: dict(scheme) for name, scheme in schemes.items() if scheme != commonest}


def _scheme(spec: LinearSpec) -> dict[str, Any]:
    bits, mode = spec.format.stream_widths["codes"], _mode(spec)
    if mode is not None:
        return {"group_size": MX_GROUP, "bits": bits, "mode": mode}
    return {"group_size": _group(spec), "bits": bits, "mode": "affine"}


def _mode(spec: LinearSpec) -> str | None:
    """How MLX decodes small floats; None for integers."""
    return MODES.get(spec.format.element) if isinstance(spec.format, MX) else None


def _group(spec: LinearSpec) -> int | None:
    """The largest group of MLX's that divides the row and its blocks; None if there is none."""
    width = block_width(spec.in_features, spec.format.block_size)
    is_row = width >= spec.in_features
    return next((one for one in GROUPS if spec.in_features % one == 0 and (is_row or width % one == 0)), None)


def dequantized(file: Path, described: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, weights as MLX itself decodes them, float32. described: `quantization` of config.json."""
    from mlx import core

    stored, found = core.load(str(file)), read_file(file)
    for name in [name.removesuffix(f".{SCALES}") for name in found if name.endswith(f".{SCALES}")]:
        scheme = described.get(name, described)
        settings = {key: scheme[key] for key in ("group_size", "bits", "mode")}
        parts = (stored[f"{name}.weight"], stored[f"{name}.{SCALES}"], stored.get(f"{name}.{BIASES}"))
        weight = core.dequantize(*parts, **settings).astype(core.float32)
        found[f"{name}.weight"] = torch.from_numpy(np.array(weight))
        for part in (SCALES, BIASES):
            found.pop(f"{name}.{part}", None)
    return found
