"""The quantized checkpoint: packed codes on disk, and a transformers model made from them.

    config.json, generation_config.json, tokenizer files     as transformers writes them
    lqer.json                 what each quantized linear is: shape, number formats, rank; attention; bits
    block-00000.safetensors   one per decoder block: packed codes and metadata of its linears, its norms as they were
    outside.safetensors       everything outside the blocks, as it was

Tensors of a quantized linear are named <linear>.{weight,low_rank_a,low_rank_b,bias}.<part>; no dequantized copy of a
weight is stored.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lqer.attention import QuantizedAttention, quantize_attention
from lqer.backend import BACKENDS, Backend, resolve_backend
from lqer.calibration import block_file
from lqer.errors import ModelError
from lqer.formats import NumberFormat, QuantizedTensor, format_from_dict
from lqer.layers import QuantizedLinear
from lqer.methods import LinearPlan, QuantizedWeight
from lqer.models import pick_device, prepare_model
from lqer.store import Workspace

DETAILS_FILE = "lqer.json"
OUTSIDE_FILE = "outside.safetensors"
FORMAT_VERSION = 1


def pack_linear(name: str, weight: QuantizedWeight, bias: QuantizedTensor | None) -> dict[str, Tensor]:
    """The tensors that stand for one linear in its block's file."""
    quantized = {"weight": weight.weight_OI, "bias": bias}
    if weight.low_rank is not None:
        quantized |= {"low_rank_a": weight.low_rank.a_IR, "low_rank_b": weight.low_rank.b_RO}
    return {
        f"{name}.{role}.{part}": tensor
        for role, value in quantized.items()
        if value is not None
        for part, tensor in value.pack().items()
    }


def describe_linear(plan: LinearPlan, weight: QuantizedWeight, has_bias: bool) -> dict[str, Any]:
    """The entry of one linear in lqer.json."""

    def described(value: QuantizedTensor) -> dict[str, Any]:
        return {"format": value.format.to_dict(), "shape": list(value.shape), "axis": value.axis}

    entry: dict[str, Any] = {"weight": described(weight.weight_OI)}
    if weight.low_rank is not None:
        entry["low_rank_a"] = described(weight.low_rank.a_IR)
        entry["low_rank_b"] = described(weight.low_rank.b_RO)
    if has_bias and plan.bias is not None:
        entry["bias"] = {"format": plan.bias.to_dict(), "shape": [weight.weight_OI.shape[0]], "axis": 0}
    if plan.activation is not None:
        entry["activation"] = plan.activation.to_dict()
    return entry


def write_surroundings(
    workspace: Workspace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, details: Mapping[str, Any]
) -> None:
    """Write all that is not a decoder block: outside tensors, the configuration, the tokenizer, lqer.json."""
    inside = f"{details['blocks']['name']}."
    outside: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        # Tied weights share storage and are stored under the first name; tie_weights restores the others.
        if not name.startswith(inside) and tensor.data_ptr() not in storages:
            storages.add(tensor.data_ptr())
            outside[name] = tensor
    workspace.write_tensors(OUTSIDE_FILE, outside)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        # Templates inside tokenizer_config.json: several of them would else go to a folder of their own.
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        for file in sorted(Path(folder).iterdir()):
            if file.name != "config.json":
                workspace.write(file.name, partial(_copy, file))
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    # Whoever loads the folder by another way than load_quantized is told what it is.
    config["quantization_config"] = {"quant_method": "lqer", "details": DETAILS_FILE}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    workspace.write_json("config.json", config)
    workspace.write_json(DETAILS_FILE, {"format_version": FORMAT_VERSION, **details})


def _copy(source: Path, destination: Path) -> None:
    shutil.copyfile(source, destination)


def load_quantized(
    path: str | Path, device: str | torch.device = "auto", dtype: torch.dtype | None = None, backend: str = "auto"
) -> PreTrainedModel:
    """A transformers model, ready for `generate` and lm-eval's HFLM, from a quantized checkpoint.

    dtype: of activations and of everything that is not quantized; by default float32 on a CPU, else the original's.
    backend: "emulate", ordinary arithmetic on dequantized weights; "triton", kernels on packed weights, for a GPU;
    "auto", kernels where they can run all of the checkpoint. Raises ModelError if the folder is no quantized checkpoint
    or the kernels cannot run it.
    """
    path = Path(path)
    if backend not in BACKENDS:
        raise ModelError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if not (path / DETAILS_FILE).exists():
        raise ModelError(f"{path} is no quantized checkpoint: it holds no {DETAILS_FILE}")
    details = json.loads((path / DETAILS_FILE).read_text(encoding="utf-8"))
    if details["format_version"] != FORMAT_VERSION:
        raise ModelError(f"{path / DETAILS_FILE}: format_version {details['format_version']} is not {FORMAT_VERSION}")
    device = pick_device(str(device))
    config = AutoConfig.from_pretrained(path)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else (getattr(config, "dtype", None) or torch.bfloat16)
    formats = {name: _formats(entry) for name, entry in details["linears"].items()}
    resolved = resolve_backend(backend, device, dtype, formats)

    # Parameters stay on the meta device until their values are read; buffers (rotary tables) are computed for real.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    prepare_model(model)
    _fill(model, load_file(path / OUTSIDE_FILE), {}, device, dtype, resolved)
    for index in range(details["blocks"]["count"]):
        prefix = f"{details['blocks']['name']}.{index}."
        linears = {name: entry for name, entry in details["linears"].items() if name.startswith(prefix)}
        _fill(model, load_file(path / block_file(index)), linears, device, dtype, resolved)
    _tie(model)
    _refuse_unfilled(model, path)
    if details["attention"] is not None:
        operand = format_from_dict(details["attention"]["format"])
        quantize_attention(model, QuantizedAttention(operand, details["attention"]["blocks"]))
    # Its quantized linears are no parameters: transformers would write a folder without them, in silence.
    model.save_pretrained = _refuse_saving
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.to(device).eval()


def _formats(entry: Mapping[str, Any]) -> tuple[NumberFormat, NumberFormat | None]:
    """The number formats of a linear's weight and of its input."""
    activation = format_from_dict(entry["activation"]) if "activation" in entry else None
    return format_from_dict(entry["weight"]["format"]), activation


def _refuse_saving(*arguments: Any, **options: Any) -> None:
    raise ModelError("a model from load_quantized is not saved again: copy its checkpoint folder")


def _fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> None:
    """Put the tensors of one file into the model: quantized linears as modules, the rest as parameters and buffers."""
    taken: set[str] = set()
    for name, entry in linears.items():
        model.set_submodule(name, _linear(tensors, name, entry, device, dtype, backend))
        taken |= {key for key in tensors if key.startswith(f"{name}.")}
    for key in tensors.keys() - taken:
        owner_name, _, leaf = key.rpartition(".")
        owner = model.get_submodule(owner_name)
        tensor = tensors[key].to(device)
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)


def _linear(
    tensors: Mapping[str, Tensor],
    name: str,
    entry: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> nn.Module:
    """One quantized linear from its packed tensors, as the backend runs it."""
    weight, a_IR, b_RO, bias = (
        _unpack(tensors, name, role, entry, device) for role in ("weight", "low_rank_a", "low_rank_b", "bias")
    )
    assert weight is not None
    bias_O = bias.dequantize(dtype) if bias is not None else None
    if bias is None and f"{name}.bias" in tensors:
        bias_O = tensors[f"{name}.bias"].to(device, dtype)
    activation = format_from_dict(entry["activation"]) if "activation" in entry else None
    if backend == "triton":
        from lqer.kernels import PackedLinear, TritonLinear

        return TritonLinear(PackedLinear.pack(weight, a_IR, b_RO, bias_O, activation, dtype))
    a, b = (None if factor is None else factor.dequantize(dtype) for factor in (a_IR, b_RO))
    return QuantizedLinear(weight.dequantize(dtype), bias_O, a, b, activation)


def _unpack(
    tensors: Mapping[str, Tensor], name: str, role: str, entry: Mapping[str, Any], device: torch.device
) -> QuantizedTensor | None:
    if role not in entry:
        return None
    prefix = f"{name}.{role}."
    packed = {key.removeprefix(prefix): tensor.to(device) for key, tensor in tensors.items() if key.startswith(prefix)}
    described = entry[role]
    return format_from_dict(described["format"]).unpack(packed, tuple(described["shape"]), described["axis"])


def _tie(model: PreTrainedModel) -> None:
    """Share the weights that the checkpoint holds once; those it holds apart stay apart, whatever the config says."""
    missing = {name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.is_meta}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def _refuse_unfilled(model: nn.Module, path: Path) -> None:
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing:
        raise ModelError(f"{path} holds no values for {missing[0]} ({len(missing)} parameters in all)")
