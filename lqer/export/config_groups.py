"""How compressed-tensors describes linears in config.json: groups of one layout and one set of arguments.

A group's entry names its linears, the layout of their tensors (lqer/export/compressed_tensors.py lists them), and the
arguments of their weights and inputs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from lqer.export.base import unsupported_transposed
from lqer.export.integers import IntegerScheme, integer_schemes, unsupported_group, unsupported_integers
from lqer.export.source import LinearSpec, Outline
from lqer.formats import MX, Int

VERSION = "0.20.0"  # whose layout this is
MX_LAYOUTS = {
    "mxfp4_e2m1": "mxfp4-pack-quantized",
    "mxfp6_e2m3": "mxfp6-pack-quantized",
    "mxfp8_e4m3": "mxfp8-quantized",
}
MX_GROUP = 32
WORD_BITS = 32
DEQUANTIZE = "dequantize"
# Linears are named by their class.
ALL_LINEARS = ["Linear"]
W8A8_WEIGHT = ("row", 8, True)
W8A8_ACTIVATION = Int(bits=8, block_size="row", symmetric=True, scale_dtype="float32")
TOKEN_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
# The linears of experts, wherever those of other linears differ.
EXPERTS = r"re:.*\.experts\.\d+\..*"
# In which vLLM runs packed experts.
EXPERT_BITS = (4, 8)
# vLLM runs these as one matrix, by the scheme of the first.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Group:
    """The linears of one layout and one set of quantization arguments: a `config_groups` entry."""

    layout: str
    weights: tuple[tuple[str, Any], ...]
    activations: bool

    def to_dict(self, targets: list[str]) -> dict[str, Any]:
        """The entry of config.json. targets: how it names its linears."""
        return {
            "targets": targets,
            "format": self.layout,
            "weights": dict(self.weights),
            "input_activations": TOKEN_INT8 if self.activations else None,
            "output_activations": None,
        }


def is_float(spec: LinearSpec) -> bool:
    """Whether the weight is stored as small floats with E8M0 scales."""
    return isinstance(spec.format, MX) and spec.format.element in MX_LAYOUTS


def is_w8a8(spec: LinearSpec) -> bool:
    """Whether both operands are int8 with a scale for each row and each token."""
    weight = spec.format
    is_int8 = isinstance(weight, Int) and (weight.block_size, weight.bits, weight.symmetric) == W8A8_WEIGHT
    return is_int8 and spec.activation == W8A8_ACTIVATION


def config_groups(model: Outline) -> dict[str, Group]:
    """The group of every quantized linear, by name."""
    schemes = integer_schemes(model.specs.values())
    return {name: _group(spec, schemes[name]) for name, spec in model.specs.items()}


def _group(spec: LinearSpec, scheme: IntegerScheme) -> Group:
    shared: dict[str, Any] = {"dynamic": False, "actorder": None}
    if isinstance(spec.format, MX) and spec.format.element in MX_LAYOUTS:
        numbers = {"num_bits": scheme.bits, "type": "float", "symmetric": True}
        blocks = {"strategy": "group", "group_size": MX_GROUP, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        return Group(MX_LAYOUTS[spec.format.element], tuple({**numbers, **blocks, **shared}.items()), False)
    numbers = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
    blocks = {"strategy": "channel" if scheme.group is None else "group", "group_size": scheme.group}
    layout = "int-quantized" if is_w8a8(spec) else "pack-quantized"
    return Group(layout, tuple({**numbers, **blocks, **shared}.items()), is_w8a8(spec))


def unsupported_together(model: Outline) -> tuple[str, str] | None:
    """A linear that cannot be stored together with the others, and why; None if all can."""
    if (transposed := unsupported_transposed(model)) is not None:
        return transposed
    schemes = integer_schemes(model.specs.values())
    for spec in model.specs.values():
        is_integer = unsupported_integers(spec.format) is None
        if is_integer and (ragged := unsupported_group(spec, schemes[spec.name])) is not None:
            return spec.name, ragged
    groups = config_groups(model)
    for name in groups:
        parent, _, leaf = name.rpartition(".")
        for fused in FUSED:
            together = {groups.get(f"{parent}.{other}") for other in fused if f"{parent}.{other}" in model.modules}
            if leaf in fused and len(together) > 1:
                return name, f"vLLM runs {', '.join(fused)} as one matrix, and they have different layouts"
    return None


def unsupported_experts(model: Outline) -> tuple[str, str] | None:
    """A linear of an expert that cannot be stored, and why; None if all can, or there are none.

    They are stored one by one, under the names that the original has for them, which readers look for.
    """
    groups = config_groups(model)
    for name in model.expert_linears:
        weights = dict(groups[name].weights)
        if f"{name}.weight" not in model.saved_names:
            return name, "its architecture has no names for single experts, but stacks those of a layer"
        if groups[name].layout != "pack-quantized" or not weights["symmetric"]:
            return name, "experts are stored as packed integers without zero points, their inputs not rounded"
        if weights["num_bits"] not in EXPERT_BITS:
            return name, f"experts of {weights['num_bits']} bits do not run in vLLM, only those of 4 or 8"
        if groups[name] != groups[model.expert_linears[0]]:
            return name, "readers take one layout for all experts, and it has another than the first one"
    weights_of_experts = (key for pieces in model.stacks.values() for key in pieces if key.endswith(".weight"))
    kept = next((key for key in weights_of_experts if key.removesuffix(".weight") not in model.specs), None)
    if model.expert_linears and kept is not None:
        return kept.removesuffix(".weight"), "it is not quantized, and readers take one layout for all experts"
    return None


def unsupported_in_transformers(model: Outline) -> tuple[str, str] | None:
    """A linear with zero points beside others of another layout, and why that is refused; None if there is none."""
    groups = config_groups(model)
    if len(set(groups.values())) > 1:
        for name, group in groups.items():
            if not dict(group.weights)["symmetric"]:
                reason = "it has zero points and others another layout, which transformers does not load"
                return name, f"{reason} (compressed-tensors takes it with --engine=vllm)"
    return None


def unsupported_zero_points(model: Outline) -> tuple[str, str] | None:
    """A linear whose packed zero points do not end with a word, so that vLLM cannot join matrices; None if all do."""
    for name, group in config_groups(model).items():
        weights, outputs = dict(group.weights), model.specs[name].out_features
        if not weights["symmetric"] and outputs * weights["num_bits"] % WORD_BITS:
            reason = f"{outputs} zero points of {weights['num_bits']} bits do not fill words of {WORD_BITS}"
            return name, f"{reason}, and vLLM joins matrices by words"
    return None


def quantization_config(model: Outline) -> dict[str, Any]:
    """The entry of config.json."""
    targets: dict[Group, list[str]] = defaultdict(list)
    for name, group in config_groups(model).items():
        targets[group].append(name)
    layouts = {group.layout for group in targets}
    names_of = {group: _targets(model, names) for group, names in targets.items()}
    ignored = _spellings(model, model.unquantized_linears())
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": group.to_dict(ALL_LINEARS if len(targets) == 1 else names)
            for index, (group, names) in enumerate(names_of.items())
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
    if len(targets) == 1 and any(not dict(group.weights)["symmetric"] for group in targets):
        # Packed zero points are otherwise not found by transformers' loader. Never with several groups: the key makes
        # all linears follow the first one.
        config[DEQUANTIZE] = True
    return config


def _targets(model: Outline, linears: list[str]) -> list[str]:
    """How a group names its linears: those of experts, which are all in one group, by a pattern."""
    experts = set(model.expert_linears)
    return _spellings(model, [name for name in linears if name not in experts]) + [EXPERTS] * (
        not experts.isdisjoint(linears)
    )


def _spellings(model: Outline, linears: list[str]) -> list[str]:
    """The linears' names, and those in files of a mixture where they differ: not all readers rename modules."""
    if not model.expert_linears:
        return linears
    saved = [model.saved_names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in linears]
    return list(dict.fromkeys([*linears, *saved]))
