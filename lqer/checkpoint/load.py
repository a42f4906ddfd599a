"""Loads a quantized checkpoint, a folder of packed codes, as a transformers model.

    config.json, generation_config.json, tokenizer files     as transformers writes them
    lqer.json                 what each quantized linear is: shape, number formats, rank; attention; bits
    block-00000.safetensors   one per decoder block: packed codes and metadata of its linears, its norms unquantized
    outside.safetensors       everything outside the blocks, unquantized

Tensors of a quantized linear are named <linear>.{weight,low_rank_a,low_rank_b,bias,transform}.<part>. Fine-tuned
factors have additional .{first_a,first_b}: the first columns of A and the first rows of B, in bfloat16. No dequantized
copy of a weight is stored.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from lqer.checkpoint.backend import BACKENDS, Backend, choose_backend, formats_of
from lqer.checkpoint.experts import group_experts
from lqer.checkpoint.linear import build_linear
from lqer.checkpoint.native import is_native, load_native
from lqer.checkpoint.pack import DETAILS_FILE, FORMAT_VERSION, OUTSIDE_FILE
from lqer.checkpoint.siblings import join_siblings
from lqer.checkpoint.verify import CheckpointFiles, Files
from lqer.errors import ModelError
from lqer.models.auto import auto_class, without_values
from lqer.models.dispatch import dispatch_all
from lqer.models.files import reported_as
from lqer.models.loaders import OpenedModel, Streamed
from lqer.models.open import DevicePlacement, spans_gpus
from lqer.models.reading import fill_parameters, read_file
from lqer.models.source import pick_device
from lqer.models.streaming import tie
from lqer.models.structure import prepare_model, within_block
from lqer.nn.attention import quantize_attention, quantized_attention
from lqer.store.names import block_file, checkpoint_in
from lqer.store.offload import Offload
from lqer.transforms.quarot import carry_over


def load_quantized(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    device_map: DevicePlacement = "single",
    verify: bool = True,
) -> PreTrainedModel:
    """A transformers model, ready for `generate` and lm-eval's HFLM.

    path: a run's folder, its checkpoint, or the native form of one.
    dtype: of activations and of everything that is not quantized; by default float32 on a CPU, else the original's.
    backend: "emulate" for torch operations on dequantized weights, "triton" for kernels on packed weights (GPU only),
    "auto" for kernels where they can run. device_map: "auto" distributes the model over all GPUs. verify: compare every
    file with the checkpoint's manifest as it is read; the native form has none.

    Raises ModelError if the folder is not a quantized checkpoint, a file is missing, damaged or unknown, the requested
    backend cannot run it, or it does not fit on the GPUs.
    """
    device, folder = pick_device(str(device)), checkpoint_in(Path(path))
    if not (folder / DETAILS_FILE).exists() and is_native(folder):
        return load_native(folder, device, dtype, backend, device_map)
    return load_verified(CheckpointFiles(folder, verify), device, dtype, backend, device_map)


def load_verified(
    files: Files,
    device: torch.device,
    dtype: torch.dtype | None,
    backend: str,
    device_map: DevicePlacement,
    tokens: Sequence[int] = (),
) -> PreTrainedModel:
    """The same model, from files that are verified as `files` does it.

    tokens: of each call that it is loaded for; unless they are known, kernels of all regimes are compiled and compared.
    """
    opened = open_verified(files, device, dtype, backend)
    with kernels_for(tokens, device):
        if spans_gpus(device, device_map):
            model = dispatch_all(opened)
        else:
            model = opened.whole()
        join_siblings(model, opened.blocks)
    return model


def kernels_for(tokens: Sequence[int], device: torch.device) -> AbstractContextManager[None]:
    """Within it, kernels are compiled for calls of these numbers of tokens; () where they are not known."""
    if not tokens or device.type != "cuda":
        return nullcontext()
    from lqer.kernels import calls_of

    return calls_of(tokens)


def open_verified(
    files: Files, device: torch.device, dtype: torch.dtype | None, backend: str, offload: Offload | None = None
) -> OpenedModel:
    """The same model with blocks that are read one at a time. Raises ModelError as `load_quantized` does."""
    if backend not in BACKENDS:
        raise ModelError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    details, name, count = _read_details(files)
    # Blocks are read, and verified, one at a time.
    files.verify(except_for=[*map(block_file, range(count)), OUTSIDE_FILE])
    with reported_as(f"{files.path} has no usable config.json"):
        config = AutoConfig.from_pretrained(files.path, trust_remote_code=False)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else (getattr(config, "dtype", None) or torch.bfloat16)
    resolved = choose_backend(backend, device, dtype, details["linears"])
    model, blocks = _skeleton(files.path, config, dtype, details)
    contents = _Contents(files, model, name, details["linears"], device, dtype, resolved)
    ahead = device.type == "cuda"
    loader = Streamed(contents.read, contents.fill, contents.fill_outer, ahead=ahead, phase="load")
    return OpenedModel(model, name, blocks, loader, device, offload or Offload())


def _skeleton(
    path: Path, config: PretrainedConfig, dtype: torch.dtype, details: Mapping[str, Any]
) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The model without values, in evaluation mode, and its blocks."""
    # Parameters stay on the meta device until their values are read; buffers (rotary tables) are computed for real.
    with reported_as(f"{path}: its config.json does not fit its tensors"), without_values():
        model = auto_class(config).from_config(config, dtype=dtype)
        prepare_model(model)
        blocks = cast(nn.ModuleList, model.get_submodule(details["blocks"]["name"]))
    if details["attention"] is not None:
        quantize_attention(model, quantized_attention(details["attention"]))
    # Quantized linears have no parameters: save_pretrained would silently write a folder without them.
    model.save_pretrained = _refuse_saving
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), blocks


@dataclass(frozen=True)
class _Contents:
    """What the tensor files put into a skeleton, in a dtype and for a backend.

    name: of the ModuleList of blocks. linears: the entries of lqer.json. device: of everything outside the blocks.
    """

    files: Files
    model: PreTrainedModel
    name: str
    linears: Mapping[str, Mapping[str, Any]]
    device: torch.device
    dtype: torch.dtype
    backend: Backend

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block as stored, by their names within it."""
        prefix = f"{self.name}.{index}."
        return {key.removeprefix(prefix): tensor for key, tensor in self._read_file(block_file(index)).items()}

    def fill(self, block: nn.Module, index: int, tensors: dict[str, Tensor], where: torch.device) -> None:
        """Make a block of them on a device; empties `tensors`."""
        prefix, file = f"{self.name}.{index}.", self.files.path / block_file(index)
        linears = within_block(self.linears, f"{self.name}.{index}")
        _refuse_unknown(file, prefix, block, tensors, linears)
        with reported_as(f"{file} does not hold what {DETAILS_FILE} says"):
            fill_block(block, tensors, linears, where, self.dtype, self.backend)
        _refuse_unfilled(self.files.path, prefix, block)

    def fill_outer(self) -> None:
        """Fill everything outside the blocks."""
        tensors = self._read_file(OUTSIDE_FILE)
        _refuse_unknown(self.files.path / OUTSIDE_FILE, "", self.model, tensors, {})
        fill_parameters(self.model, tensors, self.device, self.dtype)
        tie(self.model)
        _refuse_unfilled(self.files.path, "", self.model, except_below=f"{self.name}.")

    def _read_file(self, name: str) -> dict[str, Tensor]:
        file = self.files.file(name)
        with reported_as(f"{file} is damaged"):
            return read_file(file, pinned=self.device.type == "cuda")


def _read_details(files: Files) -> tuple[dict[str, Any], str, int]:
    """What lqer.json says, the name of the blocks and their number. Raises ModelError where it cannot be read."""
    file = files.path / DETAILS_FILE
    if not file.exists():
        missing = f"it has no {DETAILS_FILE}" if files.path.is_dir() else "no such folder"
        raise ModelError(f"{files.path} is not a quantized checkpoint: {missing}")
    with reported_as(f"{file} is damaged"):
        details = json.loads(files.file(DETAILS_FILE).read_text(encoding="utf-8"))
        if (version := details["format_version"]) != FORMAT_VERSION:
            raise ModelError(f"{file}: format_version {version} is not supported, only {FORMAT_VERSION}")
        name, count = details["blocks"]["name"], details["blocks"]["count"]
        for entry in details["linears"].values():
            formats_of(entry)  # so that one that is none is this file's fault
    return details, name, count


def _refuse_saving(*arguments: Any, **options: Any) -> None:
    raise ModelError("a quantized model cannot be saved with save_pretrained; copy its checkpoint folder")


def fill_block(
    module: nn.Module,
    tensors: dict[str, Tensor],
    linears: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> None:
    """Replace the quantized linears of a module, and set its other parameters and buffers; empties `tensors`.

    tensors: as stored, by their names within the module. linears: their entries of lqer.json, by name.
    """
    of_linears: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
    for key in list(tensors):
        # `<linear>.<role>.<part>`, or a bias that is not quantized.
        for name in (key.rsplit(".", 2)[0], key.rsplit(".", 1)[0]):
            if name in of_linears:
                of_linears[name][key] = tensors.pop(key)
                break
    for name, entry in linears.items():
        linear = build_linear(of_linears.pop(name), name, entry, device, dtype, backend)
        carry_over(module.get_submodule(name), linear)
        module.set_submodule(name, linear)
    if backend == "triton":
        group_experts(module)
    fill_parameters(module, tensors, device, dtype)


def _refuse_unknown(
    file: Path,
    prefix: str,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raise ModelError for a tensor of a shape or name that the module and its quantized linears do not have."""
    expected = module.state_dict()
    parts = tuple(f"{linear}.{role}." for linear, entry in linears.items() for role in entry)
    weights = {f"{linear}.weight" for linear in linears}
    for name, tensor in tensors.items():
        if name.startswith(parts):
            continue
        if name not in expected or name in weights:
            raise ModelError(f"{file} holds a tensor that the model does not use: {prefix}{name}")
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[name].shape)}"
            raise ModelError(f"{prefix}{name} in {file} has shape {shapes}")


def _refuse_unfilled(path: Path, prefix: str, module: nn.Module, except_below: str | None = None) -> None:
    missing = [
        f"{prefix}{name}"
        for name, tensor in module.named_parameters()
        if tensor.is_meta and not (except_below and name.startswith(except_below))
    ]
    if missing:
        raise ModelError(f"{path} has no values for {missing[0]} ({len(missing)} parameters in all)")
