"""Finds and loads causal language models: hub ids, local folders, .safetensors and .gguf files, demo models.

Weights are read from safetensors or GGUF only, never from a pickle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lqer.errors import HubError, ModelError
from lqer.models.demo import DEMO_PREFIX, demo_description, resolve_demo_model
from lqer.models.structure import prepare_model
from lqer.store.files import content_hash, hash_file

DEVICE = re.compile(r"cpu|cuda(:\d{1,4})?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model is read from, and the fingerprint that names it in the store."""

    name: str
    path: str
    revision: str | None
    fingerprint: str
    description: str
    load_args: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What stands for the model in the key of a stage."""
        return self.fingerprint


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a model by hub id, local folder, .safetensors or .gguf file, or `demo:` name.

    Raises ModelError if there is no such model, or only a pickled one.
    """
    if name.startswith(DEMO_PREFIX):
        folder = resolve_demo_model(name)
        return ModelSource(name, str(folder), None, _fingerprint_folder(folder), demo_description(name))
    if not name.isprintable():
        raise ModelError(f"model: {name!r} is neither a path nor a hub id")
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
            raise ModelError(f"model: {path} has no config.json")
        if not any(path.glob("*.safetensors")):
            raise ModelError(f"model: {path} has no .safetensors file (pickled weights are not read)")
        return ModelSource(name, str(path), None, _fingerprint_folder(path), f"local folder {path.name}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model: no such file or folder: {name}")
    return _resolve_hub(name, revision)


def _resolve_hub(name: str, revision: str | None) -> ModelSource:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HubError(f"model: {name} is not a local folder, and the hub refuses it: {reason}") from None
    commit = getattr(config, "_commit_hash", None) or revision or "main"
    return ModelSource(name, name, commit, content_hash([name, commit]), f"{name}@{commit[:12]}")


def _fingerprint_folder(folder: Path) -> str:
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.model")])
    return content_hash({file.name: hash_file(file) for file in files})


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. Raises ModelError for a device that does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.device_count() else "cpu")
    # Asked of torch, some of its other devices print warnings, and nothing here has run on them.
    if not DEVICE.fullmatch(name):
        raise ModelError(f'device: {name!r} is not supported; use "auto", "cpu", "cuda" or "cuda:1"')
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device: {name!r} is not available: this machine has {torch.cuda.device_count()} usable GPUs")
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


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype that config.json states for the weights; float32 if it states none."""
    return getattr(load_model_config(source), "dtype", None) or torch.float32


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Raises ModelError if there is no tokenizer, or one without a vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision, **source.load_args)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {source.name} has no usable tokenizer: {str(error).splitlines()[0]}") from None
    if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
        # tokenizer_config.json without the vocabulary's own file gives a tokenizer that maps every text to nothing.
        raise ModelError(f"model: {source.name} has a tokenizer without a vocabulary: are its files complete?")
    return tokenizer


def load_model(source: ModelSource, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """Load the model in eval mode; dtype "auto" is the checkpoint's own. Raises ModelError with the reason."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision,
            dtype=dtype,
            # GGUF has its own loader; anything else must be safetensors, so that no pickle is ever opened.
            use_safetensors=None if source.load_args else True,
            **source.load_args,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"model: {source.name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    prepare_model(model)
    nn.Module.to(model, device)
    return model.eval()
