"""Finds and loads causal language models: hub ids, local folders, .safetensors and .gguf files, demo models.

Weights are read from safetensors or GGUF only, never from a pickle, and code that comes with a model is never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, OfflineModeIsEnabled
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)
from transformers.utils.quantization_config import GgufConfig

from lqer.data.hub import hub_out_of_reach
from lqer.errors import HubError, ModelError
from lqer.models.auto import auto_class
from lqer.models.coded import coded_tensors, plain_config, plain_header
from lqer.models.demo import DEMO_PREFIX, demo_description, resolve_demo_model
from lqer.models.files import (
    DISTRIBUTED_SHARD,
    Find,
    Header,
    finder,
    hub_headers,
    largest_block,
    processor_files,
    read_header,
    reported_as,
    weight_files,
)
from lqer.models.gguf_header import check_gguf
from lqer.models.structure import prepare_model
from lqer.models.verify import check_tensors, quiet_loading, refuse_foreign_linears, refuse_mismatch
from lqer.phases import in_phase
from lqer.store.files import content_hash
from lqer.store.fingerprints import Fingerprints, State, state_of

DEVICE = re.compile(r"cpu|cuda(:\d{1,4})?")
# Files of a model's folder that nothing reads: weights in other formats than safetensors, code, documents.
NEVER_READ = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".md", ".msgpack", ".onnx", ".ot", ".pdf", ".png", ".pt", ".pth", ".py"}
    | {".jpg", ".safetensors"}
)
TEMPLATES = "additional_chat_templates/*.jinja"
# Attention functions of torch alone; any other needs a package, or code from the hub.
ATTENTION = ("sdpa", "eager")
# The quantized checkpoints that are dequantized as they are read.
DEQUANTIZED = ("fp8", "mxfp4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# transformers asks on the terminal whether to run a model's code wherever it is not told `trust_remote_code`, which not
# all of its calls pass on. Without time for an answer it refuses.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


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

    @property
    def find(self) -> Find:
        """The path of a file of the model by its name, None if there is none."""
        return finder(self.path, self.revision)


def resolve_model(name: str, revision: str | None = None, fingerprints: Fingerprints | None = None) -> ModelSource:
    """Find a model by hub id, local folder, .safetensors or .gguf file, or `demo:` name.

    fingerprints: what is remembered of its files; without, they are all hashed.
    Raises ModelError if there is no such model, or only a pickled one.
    """
    fingerprints = fingerprints or Fingerprints()
    if name.startswith(DEMO_PREFIX):
        folder = resolve_demo_model(name)
        return ModelSource(name, str(folder), None, _fingerprint_folder(folder, fingerprints), demo_description(name))
    if not name.isprintable():
        raise ModelError(f"model: {name!r} is neither a path nor a hub id")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model: no such file: {name}")
        args = {"gguf_file": path.name}
        fingerprint = _fingerprint_files(path.parent, [path, *_small_files(path.parent)], fingerprints)
        return ModelSource(name, str(path.parent), None, fingerprint, f"GGUF file {path.name}", args)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ModelError(f"model: no such file: {name}")
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model: {path} has no config.json")
        return ModelSource(name, str(path), None, _fingerprint_folder(path, fingerprints), f"local folder {path.name}")
    if path.is_file():
        raise ModelError(f"model: {name} is neither a folder nor a .safetensors or .gguf file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model: no such file or folder: {name}")
    return _resolve_hub(name, revision)


def _resolve_hub(name: str, revision: str | None) -> ModelSource:
    out_of_reach = hub_out_of_reach()
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        refused = f"the hub refuses it: {str(error).strip().splitlines()[0]}"
        reason = f"the hub cannot be asked: {out_of_reach}" if out_of_reach else refused
        raise HubError(f"model: {name} is not a local folder, and {reason}") from None
    commit = getattr(config, "_commit_hash", None) or revision or "main"
    return ModelSource(name, name, commit, content_hash([name, commit]), f"{name}@{commit[:12]}")


def _fingerprint_folder(folder: Path, fingerprints: Fingerprints) -> str:
    """A hash of all files that loading may read. Raises ModelError for weights that cannot be read."""
    for file in folder.iterdir():
        if DISTRIBUTED_SHARD.fullmatch(file.name):
            raise ModelError(f"model: {folder} holds a distributed checkpoint ({file.name}): save the whole model")
    weights = weight_files(finder(str(folder), None), str(folder))
    return _fingerprint_files(folder, [*weights, *_small_files(folder)], fingerprints)


def _small_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer and templates: every file whose suffix does not tell that nothing reads it."""
    files = [file for file in folder.iterdir() if file.suffix not in NEVER_READ and not file.name.startswith(".")]
    return [file for file in [*files, *folder.glob(TEMPLATES)] if file.is_file() or file.is_symlink()]


@in_phase("fingerprint")
def _fingerprint_files(folder: Path, files: list[Path], fingerprints: Fingerprints) -> str:
    files = [file for file in files if file.is_file() or not file.is_dir()]
    try:
        hashes = fingerprints.of(files)
    except OSError as error:
        raise ModelError(f"model: {error.filename} cannot be read: {error.strerror or error}") from None
    return content_hash({file.relative_to(folder).as_posix(): found for file, found in zip(files, hashes, strict=True)})


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
    """The model's configuration. Raises ModelError, in one line, if it cannot be read or the model is quantized."""
    if source.load_args:
        check_gguf(Path(source.path) / source.load_args["gguf_file"])
    with reported_as(f"model: {source.name} has no usable configuration"):
        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=False, **source.load_args
        )
        if config._attn_implementation not in ATTENTION:
            config._attn_implementation = None
    if getattr(config, "transformers_weights", None) is not None:
        raise ModelError(f"model: the config.json of {source.name} sets transformers_weights, which is not supported")
    if not source.load_args:
        _dequantize_or_refuse(source, config)
    return config


def _dequantize_or_refuse(source: ModelSource, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
    if method not in DEQUANTIZED:
        raise ModelError(
            f"model: {source.name} is quantized already (quant_method {method!r}): use the original model, or save it "
            "dequantized (transformers: model.dequantize())"
        )
    # Some GPUs would compute with the stored codes otherwise.
    quantization["dequantize"] = True


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype that config.json states for the weights; float32 if it states none."""
    return getattr(load_model_config(source), "dtype", None) or torch.float32


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Raises ModelError if there is no tokenizer, or one without a vocabulary."""
    with reported_as(f"model: {source.name} has no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=False, **source.load_args
        )
    if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
        # tokenizer_config.json without the vocabulary's own file gives a tokenizer that maps every text to nothing.
        raise ModelError(f"model: {source.name} has a tokenizer without a vocabulary: are its files complete?")
    # How this process found the files would be saved with the tokenizer, and differ between machines.
    for found_by in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(found_by, None)
    return tokenizer


def load_processor(source: ModelSource) -> Any:
    """What makes a wrapper's inputs of images and texts; None where the model has none. Raises ModelError."""
    if not processor_files(source.find):
        return None
    with reported_as(f"model: {source.name} has no usable processor"):
        return AutoProcessor.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)


def check_weights(source: ModelSource) -> None:
    """Refuse a checkpoint with missing, unexpected, mis-shaped or quantized tensors, by name: reads headers alone.

    Files that passed are not looked at again as long as they are what they were: every stage opens the model. Of a GGUF
    file, only its loader knows which tensor becomes which parameter: `load_model` refuses what does not match. Raises
    ModelError.
    """
    if not source.load_args:
        _check_headers(source.name, source.path, source.revision, _states_of(Path(source.path)))


def _states_of(folder: Path) -> tuple[tuple[str, State], ...]:
    """The states of the files in a local folder; those of the hub's commits never change."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((file.name, state_of(file)) for file in files if file.is_file())


@lru_cache(maxsize=4)
def _check_headers(name: str, path: str, revision: str | None, states: tuple[tuple[str, State], ...]) -> None:
    """states: of the files; whenever they differ the model is checked anew."""
    source = ModelSource(name, path, revision, "", "")
    config, headers = load_model_config(source), _headers(source)
    coded = coded_tensors(config, headers)
    headers = [plain_header(header, coded, config) for header in headers]
    check_tensors(source.name, plain_config(config), headers)


def stored_block_bytes(source: ModelSource) -> int | None:
    """Bytes of the largest decoder block in the model's files; None for a GGUF file, which is expanded in one piece."""
    return None if source.load_args else largest_block(_headers(source))


def _headers(source: ModelSource) -> list[Header]:
    """The headers of all weight files; of a hub repository, those alone are downloaded."""
    if not Path(source.path).is_dir():
        try:
            return hub_headers(source.path, source.revision)
        except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError, OfflineModeIsEnabled):
            pass  # without the network the files may still be in the cache
    return [read_header(file) for file in weight_files(source.find, source.name)]


def load_model(source: ModelSource, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """Load the model in eval mode; dtype "auto" is the checkpoint's own.

    Raises ModelError, in one line, if a tensor is missing, unexpected or of another shape, or the model cannot be
    loaded for another reason.
    """
    check_weights(source)
    config = load_model_config(source)
    if source.load_args:
        # Where GGUF has kernels, its loader would keep the stored codes.
        options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
    else:
        # So that no pickle is ever opened.
        options = {"config": config, "use_safetensors": True}
    with reported_as(f"model: {source.name} cannot be loaded"), quiet_loading():
        loaded: Any = auto_class(config).from_pretrained(
            source.path,
            revision=source.revision,
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation=config._attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
            **source.load_args,
        )
    model, found = loaded
    refuse_mismatch(source.name, found)
    refuse_foreign_linears(source.name, model)
    prepare_model(model)
    nn.Module.to(model, device)
    return model.eval()
