"""Loads causal language models and finds in them what is quantized: decoder blocks and their linears.

No architecture is named here. Decoder blocks are the largest ModuleList whose members the model declares as not to be
split; a block's linears are its nn.Linear modules. Weights are read from safetensors or GGUF only, never from a pickle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lqer.demo import DEMO_PREFIX, demo_description, resolve_demo_model
from lqer.errors import HubError, ModelError
from lqer.files import content_hash, hash_file
from lqer.transforms.hadamard import hadamard
from lqer.transforms.quarot import OnlineRotation, attach

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A key of config.json: linears by full name, and across how many heads their inputs are rotated (null: all of it).
ONLINE_ROTATIONS = "online_rotations"

# Of the matrices in the decoder blocks: routers and the like are small.
MAX_UNQUANTIZED_SHARE = 0.05


@dataclass(frozen=True)
class ModelSource:
    """Where a model is read from, and the fingerprint that names it in the store."""

    name: str
    path: str
    revision: str | None
    fingerprint: str
    description: str
    load_args: dict[str, Any] = field(default_factory=dict)


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a model by hub id, local folder, .safetensors or .gguf file, or `demo:` name.

    Raises ModelError if there is no such model, or only a pickled one.
    """
    if name.startswith(DEMO_PREFIX):
        folder = resolve_demo_model(name)
        return ModelSource(name, str(folder), None, _fingerprint_folder(folder), demo_description(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model: no such file: {name}")
        args = {"gguf_file": path.name}
        return ModelSource(name, str(path.parent), None, hash_file(path), f"GGUF file {path.name}", args)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ModelError(f"model: no such file: {name}")
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"model: {path} holds no config.json")
        if not any(path.glob("*.safetensors")):
            raise ModelError(f"model: {path} holds no .safetensors file (pickled weights are not read)")
        return ModelSource(name, str(path), None, _fingerprint_folder(path), f"local folder {path.name}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model: no such file or folder: {name}")
    return _resolve_hub(name, revision)


def _resolve_hub(name: str, revision: str | None) -> ModelSource:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HubError(f"model: {name} is no local folder and cannot be had from the hub: {reason}") from None
    commit = getattr(config, "_commit_hash", None) or revision or "main"
    return ModelSource(name, name, commit, content_hash([name, commit]), f"{name}@{commit[:12]}")


def _fingerprint_folder(folder: Path) -> str:
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.model")])
    return content_hash({file.name: hash_file(file) for file in files})


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises ModelError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.device_count() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f'device: {name!r} is no torch device (use "auto", "cpu" or "cuda")') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device: {name!r} asked for, but this machine has {torch.cuda.device_count()} usable GPUs")
    return device


def pick_dtype(name: str, source: ModelSource, device: torch.device) -> torch.dtype:
    """The dtype of activations: "auto" is float32 on a CPU, else the checkpoint's own."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    stored = getattr(load_model_config(source), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


def load_model_config(source: ModelSource) -> Any:
    return AutoConfig.from_pretrained(source.path, revision=source.revision, **source.load_args)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source.path, revision=source.revision, **source.load_args)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {source.name} has no usable tokenizer: {str(error).splitlines()[0]}") from None


def load_model(source: ModelSource, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """Load the model in eval mode; dtype "auto" is the checkpoint's own. Raises ModelError with the reason."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision,
            dtype=dtype,
            # GGUF has a loader of its own; anything else must be safetensors, so that no pickle is ever opened.
            use_safetensors=None if source.load_args else True,
            **source.load_args,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"model: {source.name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    prepare_model(model)
    nn.Module.to(model, device)
    return model.eval()


def prepare_model(model: PreTrainedModel) -> None:
    """Make of a model, in place, one whose linears are all nn.Linear and that runs as its config.json says.

    GPT-2's Conv1D, a linear with its weight transposed, is replaced. Of a model that was rotated (lqer/rotation.py),
    the inputs of the linears that its configuration names are rotated as it runs.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            linear = nn.Linear(in_features, out_features, device=module.weight.device, dtype=module.weight.dtype)
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    for name, heads in getattr(model.config, ONLINE_ROTATIONS, {}).items():
        attach(model.get_submodule(name), OnlineRotation(hadamard, heads))


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: full name and ModuleList. Raises ModelError if the model has none or cannot be quantized."""
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    declared = [(name, blocks) for name, blocks in lists if all(type(block).__name__ in unsplit for block in blocks)]
    candidates = declared or lists
    if not candidates:
        raise ModelError(f"{type(model).__name__} holds no ModuleList of decoder blocks")
    name, blocks = max(candidates, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    _refuse_unknown_weights(name, blocks)
    return name, blocks


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of one block by their name within it, in the order of registration."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _refuse_unknown_weights(list_name: str, blocks: nn.ModuleList) -> None:
    """A weight that is no nn.Linear's would silently stay unquantized, and the stated bits would be a flattery."""
    inside, outside, largest = 0, 0, ("", nn.Parameter(), "")
    for name, module in blocks.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            if isinstance(module, nn.Linear):
                inside += parameter.numel()
                continue
            found = (f"{list_name}.{name}.{parameter_name}", parameter, type(module).__name__)
            if parameter.ndim >= 3:
                raise ModelError(
                    f"{found[0]} is a {parameter.ndim}-D parameter of {found[2]}, not an nn.Linear: "
                    "mixture-of-experts and convolution weights of this kind are not supported"
                )
            outside += parameter.numel()
            largest = max(largest, found, key=lambda candidate: candidate[1].numel())
    if outside > MAX_UNQUANTIZED_SHARE * (inside + outside):
        raise ModelError(
            f"{outside / (inside + outside):.0%} of the decoder blocks' weights are no nn.Linear's and would stay "
            f"unquantized (at most {MAX_UNQUANTIZED_SHARE:.0%}), the largest being {largest[0]} of {largest[2]}"
        )
