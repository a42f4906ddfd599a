"""The quantized checkpoint: packed codes on disk, and a transformers model made from them.

    config.json, generation_config.json, tokenizer files     as transformers writes them
    lqer.json                 what each quantized linear is: shape, number formats, rank; attention; bits
    block-00000.safetensors   one per decoder block: packed codes and metadata of its linears, its norms as they were
    outside.safetensors       everything outside the blocks, as it was

Tensors of a quantized linear are named <linear>.{weight,low_rank_a,low_rank_b,bias,transform}.<part>; after fine-tuning
there are .{first_a,first_b} too, which stand before the columns of A and the rows of B. No dequantized copy of a weight
is stored.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lqer.attention import quantize_attention, quantized_attention
from lqer.backend import BACKENDS, Backend, resolve_backend
from lqer.blocks import OpenedModel, Streamed
from lqer.calibration import block_file
from lqer.errors import ModelError
from lqer.formats import E8P, NumberFormat, Passthrough, QuantizedTensor, format_from_dict, without_first
from lqer.layers import HadamardLinear, QuantizedLinear
from lqer.methods import LinearPlan, QuantizedWeight
from lqer.models import pick_device, prepare_model
from lqer.spill import Spill
from lqer.store import Workspace
from lqer.streaming import fill_parameters, read_file, tie
from lqer.transforms import Hadamard, transform_from_dict
from lqer.transforms.hadamard import RandomHadamard
from lqer.transforms.quarot import carry_over

DETAILS_FILE = "lqer.json"
OUTSIDE_FILE = "outside.safetensors"
FORMAT_VERSION = 1
FACTOR_ROLES = ("first_a", "first_b", "low_rank_a", "low_rank_b")


def pack_linear(name: str, weight: QuantizedWeight, bias: QuantizedTensor | None) -> dict[str, Tensor]:
    """The tensors that stand for one linear in its block's file."""
    quantized = {"weight": weight.weight_OI, "bias": bias}
    if weight.low_rank is not None:
        quantized |= {"low_rank_a": weight.low_rank.a_IR, "low_rank_b": weight.low_rank.b_RO}
    stored = {role: value.pack() for role, value in quantized.items() if value is not None}
    if weight.basis is not None:
        stored["transform"] = weight.basis.pack()
    return {f"{name}.{role}.{part}": tensor for role, parts in stored.items() for part, tensor in parts.items()}


def describe_linear(plan: LinearPlan, weight: QuantizedWeight, has_bias: bool) -> dict[str, Any]:
    """The entry of one linear in lqer.json."""
    entry: dict[str, Any] = {"weight": _described(weight.weight_OI)}
    if weight.low_rank is not None:
        entry["low_rank_a"] = _described(weight.low_rank.a_IR)
        entry["low_rank_b"] = _described(weight.low_rank.b_RO)
    if has_bias and plan.bias is not None:
        entry["bias"] = {"format": plan.bias.to_dict(), "shape": [weight.weight_OI.shape[0]], "axis": 0}
    if plan.activation is not None:
        entry["activation"] = plan.activation.to_dict()
    if plan.transform is not None:
        entry["transform"] = plan.transform.to_dict()
    return entry


def replace_signs(tensors: dict[str, Tensor], name: str, signs: Mapping[str, Tensor]) -> int:
    """Put other signs, by role, for the packed ones of a block, in place. Returns how many bits more that takes."""
    before = sum(part.numel() for part in _parts(tensors, f"{name}.transform.", signs["input_signs"].device).values())
    after = RandomHadamard(signs["input_signs"], signs["output_signs"])
    tensors |= {f"{name}.transform.{part}": tensor for part, tensor in after.pack().items()}
    return after.bits - 8 * before


def split_columns(tensors: dict[str, Tensor], name: str, entry: dict[str, Any], factors: Mapping[str, Tensor]) -> int:
    """Put the first columns of A and rows of B, as they are, before those stored, which lose as many; in place.

    factors: "low_rank_a" (I, C) and "low_rank_b" (C, O) in bfloat16, stored as roles "first_a" and "first_b". Returns
    how many bits more that takes.
    """
    more = 0
    for role, first in factors.items():
        along = 1 if role == "low_rank_a" else 0
        stored = _unpack(tensors, name, role, entry, first.device)
        assert stored is not None
        all_of_them = first.shape[along] == stored.shape[along]
        for key in [key for key in tensors if key.startswith(f"{name}.{role}.")]:
            del tensors[key]
        kept = {role.replace("low_rank", "first"): Passthrough("bfloat16").quantize(first, axis=0)}
        kept |= {} if all_of_them else {role: without_first(stored, along, first.shape[along])}
        del entry[role]
        for new_role, value in kept.items():
            entry[new_role] = _described(value)
            tensors |= {f"{name}.{new_role}.{part}": tensor for part, tensor in value.pack().items()}
            more += value.code_bits + value.metadata_bits
        more -= stored.code_bits + stored.metadata_bits
    return more


def _described(value: QuantizedTensor) -> dict[str, Any]:
    return {"format": value.format.to_dict(), "shape": list(value.shape), "axis": value.axis}


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
    "auto", kernels where they can run. Raises ModelError if the folder is no quantized checkpoint or the kernels that
    are asked for cannot run it.
    """
    device = pick_device(str(device))
    model, _, blocks, loader = _open(Path(path), device, dtype, backend)
    loader.complete()
    loader.settle_in(blocks, lambda index: device)
    nn.Module.to(model, device)
    return model


def open_quantized(
    path: Path, device: torch.device, dtype: torch.dtype | None, backend: str, spill: Spill | None = None
) -> OpenedModel:
    """The same model with its blocks to be read one at a time. Raises ModelError as `load_quantized` does."""
    return OpenedModel(*_open(path, device, dtype, backend), device, spill or Spill())


def _open(
    path: Path, device: torch.device, dtype: torch.dtype | None, backend: str
) -> tuple[PreTrainedModel, str, nn.ModuleList, Streamed]:
    """The skeleton, the name of its blocks, the blocks, and what fills them."""
    if backend not in BACKENDS:
        raise ModelError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if not (path / DETAILS_FILE).exists():
        raise ModelError(f"{path} is no quantized checkpoint: it holds no {DETAILS_FILE}")
    details = json.loads((path / DETAILS_FILE).read_text(encoding="utf-8"))
    if details["format_version"] != FORMAT_VERSION:
        raise ModelError(f"{path / DETAILS_FILE}: format_version {details['format_version']} is not {FORMAT_VERSION}")
    config = AutoConfig.from_pretrained(path)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else (getattr(config, "dtype", None) or torch.bfloat16)
    formats = {name: _formats(entry) for name, entry in details["linears"].items()}
    if backend == "auto" and any(FACTOR_ROLES[0] in entry for entry in details["linears"].values()):
        backend = "emulate"  # kernels run one A and one B, not trained columns beside them
    resolved = resolve_backend(backend, device, dtype, formats)
    target: torch.dtype = dtype

    # Parameters stay on the meta device until their values are read; buffers (rotary tables) are computed for real.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=target)
    prepare_model(model)
    name = details["blocks"]["name"]
    blocks = cast(nn.ModuleList, model.get_submodule(name))

    def read(index: int) -> dict[str, Tensor]:
        prefix = f"{name}.{index}."
        stored = read_file(path / block_file(index), pinned=device.type == "cuda")
        return {key.removeprefix(prefix): tensor for key, tensor in stored.items()}

    def fill(block: nn.Module, index: int, tensors: dict[str, Tensor], where: torch.device) -> None:
        prefix = f"{name}.{index}."
        linears = {key.removeprefix(prefix): e for key, e in details["linears"].items() if key.startswith(prefix)}
        fill_block(block, tensors, linears, where, target, resolved)
        _refuse_unfilled(path, prefix, block)

    def surround() -> None:
        fill_parameters(model, read_file(path / OUTSIDE_FILE), device, target)
        tie(model)
        _refuse_unfilled(path, "", model, besides=f"{name}.")

    if details["attention"] is not None:
        quantize_attention(model, quantized_attention(details["attention"]))
    # Its quantized linears are no parameters: transformers would write a folder without them, in silence.
    model.save_pretrained = _refuse_saving
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), name, blocks, Streamed(read, fill, surround, ahead=device.type == "cuda")


def _formats(entry: Mapping[str, Any]) -> tuple[NumberFormat, NumberFormat | None]:
    """The number formats of a linear's weight and of its input."""
    activation = format_from_dict(entry["activation"]) if "activation" in entry else None
    return format_from_dict(entry["weight"]["format"]), activation


def _refuse_saving(*arguments: Any, **options: Any) -> None:
    raise ModelError("a model from load_quantized is not saved again: copy its checkpoint folder")


def fill_block(
    module: nn.Module,
    tensors: dict[str, Tensor],
    linears: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> None:
    """Put tensors into the module they are named in: quantized linears as modules, the rest as parameters and buffers.

    Takes them out of the dictionary.
    """
    for name, entry in linears.items():
        linear = _linear(tensors, name, entry, device, dtype, backend)
        carry_over(module.get_submodule(name), linear)
        module.set_submodule(name, linear)
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]
    fill_parameters(module, tensors, device, dtype)


def _linear(
    tensors: Mapping[str, Tensor],
    name: str,
    entry: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> nn.Module:
    """One quantized linear from its packed tensors, as the backend runs it."""
    bias = _unpack(tensors, name, "bias", entry, device)
    bias_O = bias.dequantize(dtype) if bias is not None else None
    if bias is None and f"{name}.bias" in tensors:
        bias_O = tensors[f"{name}.bias"].to(device, dtype)
    stored = {role: _unpack(tensors, name, role, entry, device) for role in FACTOR_ROLES}
    weight = _unpack(tensors, name, "weight", entry, device)
    assert weight is not None
    if "transform" not in entry:
        return _run_by(backend, name, weight, stored, bias_O, entry, dtype)
    transform = transform_from_dict(entry["transform"])
    assert isinstance(transform, Hadamard)
    basis = transform.unpack(_parts(tensors, f"{name}.transform.", device), *weight.shape).to(dtype)
    if backend == "triton" and isinstance(weight.format, E8P):
        return _run_by(backend, name, weight, stored, bias_O, entry, dtype, basis)
    return HadamardLinear(_run_by(backend, name, weight, stored, None, entry, dtype), basis, bias_O)


def _run_by(
    backend: Backend,
    name: str,
    weight: QuantizedTensor,
    factors: Mapping[str, QuantizedTensor | None],
    bias_O: Tensor | None,
    entry: Mapping[str, Any],
    dtype: torch.dtype,
    basis: RandomHadamard | None = None,
) -> nn.Module:
    """The module that computes with these tensors; factors: by FACTOR_ROLES. basis: only where kernels run it."""
    first_a, first_b, a_IR, b_RO = (factors[role] for role in FACTOR_ROLES)
    activation = format_from_dict(entry["activation"]) if "activation" in entry else None
    if backend == "triton":
        from lqer.kernels import PackedLinear, TritonLinear

        if first_a is not None:
            raise ModelError('backend "triton" runs one A and one B, not columns of bfloat16 beside them (finetune)')
        try:
            return TritonLinear(PackedLinear.pack(weight, a_IR, b_RO, bias_O, activation, dtype, basis))
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from None
    a, b = (_joined(first, rest, along, dtype) for first, rest, along in ((first_a, a_IR, 1), (first_b, b_RO, 0)))
    return QuantizedLinear(weight.dequantize(dtype), bias_O, a, b, activation)


def _joined(
    first: QuantizedTensor | None, rest: QuantizedTensor | None, along: int, dtype: torch.dtype
) -> Tensor | None:
    stored = [factor.dequantize(dtype) for factor in (first, rest) if factor is not None]
    return torch.cat(stored, dim=along) if stored else None


def _parts(tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor.to(device) for key, tensor in tensors.items() if key.startswith(prefix)}


def _unpack(
    tensors: Mapping[str, Tensor], name: str, role: str, entry: Mapping[str, Any], device: torch.device
) -> QuantizedTensor | None:
    if role not in entry:
        return None
    packed, described = _parts(tensors, f"{name}.{role}.", device), entry[role]
    return format_from_dict(described["format"]).unpack(packed, tuple(described["shape"]), described["axis"])


def _refuse_unfilled(path: Path, prefix: str, module: nn.Module, besides: str | None = None) -> None:
    missing = [
        f"{prefix}{name}"
        for name, tensor in module.named_parameters()
        if tensor.is_meta and not (besides and name.startswith(besides))
    ]
    if missing:
        raise ModelError(f"{path} holds no values for {missing[0]} ({len(missing)} parameters in all)")
