"""What reads files in compressed-tensors' layout: transformers, vLLM, and that library's own decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lqer.export.config_groups import ALL_LINEARS, DEQUANTIZE, EXPERTS
from lqer.export.source import Outline
from lqer.models.reading import read_file

SCALE = ".weight_scale"
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
# For which vLLM has no scheme.
NOT_SERVED = "mxfp6_e2m3"


def loads_in_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a folder whose config.json has this entry loads there, see `unsupported_in_transformers`."""
    is_symmetric = all(group["weights"]["symmetric"] for group in config["config_groups"].values())
    return is_symmetric or DEQUANTIZE in config


def is_served(model: Outline) -> bool:
    """Whether vLLM has a scheme for every layout of the files."""
    return all(getattr(spec.format, "element", None) != NOT_SERVED for spec in model.specs.values())


def decompressed(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder, every weight as compressed-tensors decodes it by its own group of `config`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_file(file)
    for name in [name.removesuffix(SCALE) for name in found if name.endswith(SCALE)]:
        groups = config["config_groups"].values()
        group = next(one for one in groups if one["targets"] == ALL_LINEARS or _is_among(name, one["targets"]))
        parts = {part: found.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in found}
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        found[f"{name}.weight"] = compressor.decompress(parts, QuantizationScheme(**group))["weight"]
    return found


def _is_among(name: str, targets: Sequence[str]) -> bool:
    return name in targets or (EXPERTS in targets and re.fullmatch(EXPERTS.removeprefix("re:"), name) is not None)
