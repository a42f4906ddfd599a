"""Which tensors of a quantized checkpoint are trained: `finetune.parts`.

    rht_signs    the signs of every linear's rotation become real vectors (QuIP#, arXiv 2402.04396; CALDERA, 2405.18886)
    low_rank     the first columns of A and rows of B, in bfloat16; the rest stays quantized (CALDERA)
    norms        gains and biases of norms: every vector that belongs to no quantized linear
    scales       scales of weights, A and B that are floating-point numbers, each relative to itself
    floats       norms, scales, biases of linears, and A and B where they are not quantized

All but the first two are stored in the dtypes they had: the bits do not change.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.checkpoint.pack import unpack_role
from lqer.config.schema import TrainingConfig
from lqer.formats import NumberFormat, format_from_dict
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.training.trained import Decoded, Replaced, Trained, compute_with

SIGNS, LOW_RANK, NORMS, SCALES, FACTORS = "signs", "low_rank", "norms", "scales", "factors"
# Roles of a linear in the checkpoint, by the module tensors that are decoded from them.
WEIGHT, FACTOR_ROLES = "weight", ("low_rank_a", "low_rank_b")


def learning_rates(settings: TrainingConfig) -> dict[str, float]:
    """The learning rate of every kind of trained tensor."""
    return {
        SIGNS: settings.learning_rate,
        LOW_RANK: settings.low_rank_learning_rate,
        NORMS: settings.norm_learning_rate,
        SCALES: settings.scale_learning_rate,
        FACTORS: settings.factor_learning_rate,
    }


def trained_tensors(
    model: PreTrainedModel,
    linears: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str, Tensor],
    settings: TrainingConfig,
) -> dict[str, Trained]:
    """Let a model of `load_quantized` (emulated) compute with trained tensors, in place; returns them.

    linears: the entries of lqer.json by name. stored: every tensor of the checkpoint. Trained tensors are named as they
    are stored, but <linear>.{input_signs, output_signs, low_rank_a, low_rank_b} for the parts `rht_signs` and
    `low_rank`, whose storage changes.
    """
    vectors = {name: tensor for name, tensor in model.named_parameters() if tensor.ndim == 1 and name in stored}
    found: dict[str, Trained] = {}
    for name, entry in linears.items():
        module = model.get_submodule(name)
        inner = module.inner if isinstance(module, HadamardLinear) else module
        assert isinstance(inner, QuantizedLinear)
        if "rht_signs" in settings.parts and isinstance(module, HadamardLinear):
            found |= _signs(name, module)
        if "low_rank" in settings.parts and inner.low_rank_a is not None:
            found |= _first_columns(name, inner, settings.columns)
        found |= _decoded(name, inner, entry, stored, settings)
        if "floats" in settings.parts and f"{name}.bias" in stored:
            found[f"{name}.bias"] = _vector(module, "bias", stored[f"{name}.bias"])
    if {"norms", "floats"} & {*settings.parts}:
        for name in vectors:
            owner, _, leaf = name.rpartition(".")
            found[name] = _vector(model.get_submodule(owner), leaf, stored[name])
    return found


def _signs(name: str, module: HadamardLinear) -> dict[str, Trained]:
    found = {}
    for role in ("input_signs", "output_signs"):
        signs: Tensor = getattr(module, role)
        found[f"{name}.{role}"] = Trained(signs, torch.float16, SIGNS)
        compute_with(module, role, Replaced(found[f"{name}.{role}"], signs.dtype))
    return found


def _first_columns(name: str, inner: QuantizedLinear, most: int) -> dict[str, Trained]:
    """A and B of at most that many columns are trained whole."""
    found = {}
    for role, axis in zip(FACTOR_ROLES, (1, 0)):
        whole: Tensor = getattr(inner, role)
        columns = min(most, whole.shape[axis])
        first, rest = whole.split([columns, whole.shape[axis] - columns], dim=axis)
        found[f"{name}.{role}"] = Trained(first, torch.bfloat16, LOW_RANK)
        compute_with(inner, role, Replaced(found[f"{name}.{role}"], whole.dtype, rest, axis))
    return found


def _decoded(
    name: str,
    inner: QuantizedLinear,
    entry: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    settings: TrainingConfig,
) -> dict[str, Trained]:
    """Scales of the weight and, unless `low_rank` trains them, of A and B; A and B themselves where they are floats."""
    found: dict[str, Trained] = {}
    roles = (WEIGHT,) if "low_rank" in settings.parts else (WEIGHT, *FACTOR_ROLES)
    for role in roles:
        tensor: Tensor | None = getattr(inner, role)
        if tensor is None:
            continue
        kinds = _trained_parts(role, format_from_dict(entry[role]["format"]), settings)
        if not kinds:
            continue
        quantized = unpack_role(stored, name, role, entry, tensor.device)
        assert quantized is not None
        trained = {
            part: (Trained.relative if kind == FACTORS else Trained.elementwise)(quantized.parts[part], kind)
            for part, kind in kinds.items()
        }
        compute_with(inner, role, Decoded(quantized, trained, tensor.dtype))
        found |= {f"{name}.{role}.{part}": one for part, one in trained.items()}
    return found


def _trained_parts(role: str, number_format: NumberFormat, settings: TrainingConfig) -> dict[str, str]:
    """The kind of every part that is trained, by its name. Values that are stored as they are count as codes."""
    scales = {"scales", "floats"} & {*settings.parts}
    factors = role != WEIGHT and "floats" in settings.parts
    return {
        part: FACTORS if part == "codes" else SCALES
        for part in sorted(number_format.trainable_parts)
        if (factors if part == "codes" else scales)
    }


def _vector(module: nn.Module, leaf: str, stored: Tensor) -> Trained:
    """A gain or bias, in the dtype it is stored in."""
    held: Tensor = getattr(module, leaf)
    trained = Trained.relative(stored.to(held.device), NORMS)
    compute_with(module, leaf, Replaced(trained, held.dtype))
    return trained
