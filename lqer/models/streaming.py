"""Opens a model without loading it: its skeleton, and the place on disk of each block's tensors.

That works for a safetensors checkpoint (one file or shards, a local folder or the hub) whose tensors are the model's
parameters under the model's own names, with or without the prefix of the base model, under names that transformers
changes as it loads them (wrappers), or experts under names of their own (lqer/models/stored.py), in values or in codes
with scales (lqer/models/coded.py). Where it would convert tensors in another way, and for GGUF, the whole model is
loaded, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lqer.models.auto import auto_class, without_values
from lqer.models.coded import Coded, Encoded, Scheme, coded_tensors, plain_config, plain_header
from lqer.models.files import READ_OPTIONS, Header, processor_files, read_header, reported_as, weight_files
from lqer.models.loaders import OpenedModel, Streamed
from lqer.models.source import ModelSource, check_weights, load_model, load_model_config
from lqer.models.stored import NotStreamableError, StoredNames
from lqer.models.structure import KEPT_IN_FLOAT32, find_blocks, prepare_model
from lqer.models.verify import STORED_DTYPES
from lqer.nn.stacked import Piece
from lqer.store.offload import Offload

log = logging.getLogger(__name__)

# That fill page-locked memory.
READING_THREADS = 4


@dataclass(frozen=True)
class StoredTensor:
    """The place of a parameter's values: transposed in GPT-2's Conv1D, a piece of an expert's.

    scales: the place of the scales of codes.
    """

    file: Path
    name: str
    transposed: bool
    piece: Piece | None = None
    scheme: Scheme | None = None
    scales: tuple[Path, str] | None = None

    def values(self, stored: Tensor, scales: Tensor | None) -> Tensor | Encoded:
        if self.scheme is not None and scales is not None:
            return Encoded(self.scheme, stored, scales, self.piece)
        if self.piece is not None:
            return self.piece.of(stored).clone(memory_format=torch.contiguous_format)
        return stored.T.contiguous() if self.transposed else stored


def open_model(
    source: ModelSource, dtype: torch.dtype | str, device: torch.device, offload: Offload | None = None
) -> OpenedModel:
    """The model with blocks that are read one at a time to `device`; in memory where that is not possible.

    dtype: of the parameters, "auto" for the checkpoint's own. Raises ModelError as `load_model` does.
    """
    check_weights(source)
    try:
        return _open_streamed(source, dtype, device, offload or Offload())
    except NotStreamableError as reason:
        log.info("%s: loading the whole model, not block by block: %s", source.name, reason)
    opened = OpenedModel.resident(load_model(source, dtype, torch.device("cpu")), device, offload or Offload())
    return replace(opened, processor=processor_files(source.find))


def _open_streamed(
    source: ModelSource, dtype: torch.dtype | str, device: torch.device, offload: Offload
) -> OpenedModel:  # fmt: skip
    _refuse_conversion(source)
    headers = {file: read_header(file) for file in weight_files(source.find, source.name)}
    config = load_model_config(source)
    coded = coded_tensors(config, headers.values())
    plain = {file: plain_header(header, coded, config) for file, header in headers.items()}
    model, names, transposed = _skeleton(source, dtype, plain)
    name, blocks = find_blocks(model)
    index = _with_scales(_match(model, plain, names, transposed), coded, headers)
    inside = f"{name}."
    outside = {key: stored for key, stored in index.items() if not key.startswith(inside)}
    # `dtype` may be "auto"; the skeleton has resolved it.
    target = model.dtype

    def read(block: int) -> dict[str, Tensor | Encoded]:
        prefix = f"{inside}{block}."
        wanted = {key.removeprefix(prefix): stored for key, stored in index.items() if key.startswith(prefix)}
        return read_tensors(wanted, pinned=device.type == "cuda")

    def fill(block: nn.Module, _: int, tensors: dict[str, Tensor | Encoded], where: torch.device) -> None:
        fill_parameters(block, tensors, where, target)

    def fill_outer() -> None:
        fill_parameters(model, read_tensors(outside), torch.device("cpu"), target)
        tie(model)

    loader = Streamed(read, fill, fill_outer, ahead=device.type == "cuda")
    return OpenedModel(model, name, blocks, loader, device, offload, processor_files(source.find))


def _refuse_conversion(source: ModelSource) -> None:
    if source.load_args:
        raise NotStreamableError("a GGUF file is dequantized as a whole")


def _skeleton(
    source: ModelSource, dtype: torch.dtype | str, headers: Mapping[Path, Header]
) -> tuple[PreTrainedModel, StoredNames, frozenset[str]]:
    """The model without values, the names of its tensors, and of those that it stores transposed."""
    config = plain_config(load_model_config(source))
    if isinstance(dtype, str):
        first = next(iter(headers.values()))
        stored = (STORED_DTYPES[name] for name in first.dtypes.values() if name in STORED_DTYPES)
        dtype = getattr(config, "dtype", None) or next(stored, torch.float32)
    # Buffers (rotary tables) are computed, not stored.
    with reported_as(f"model: {source.name} cannot be built"), without_values():
        model = auto_class(config).from_config(config, dtype=dtype)
    names = StoredNames.of(model)
    transposed = frozenset(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    )  # fmt: skip
    prepare_model(model)
    if model.can_generate():
        _load_generation_config(model, source)
    return model.eval(), names, transposed


def _load_generation_config(model: PreTrainedModel, source: ModelSource) -> None:
    """As from_pretrained does: from its own file, else from the generation options in config.json."""
    options: dict[str, Any] = {} if source.revision is None else {"revision": source.revision}
    try:
        model.generation_config = GenerationConfig.from_pretrained(source.path, **options)
    except OSError:
        options |= {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(source.path, **options)


def _match(
    model: PreTrainedModel, headers: Mapping[Path, Header], names: StoredNames, transposed: Iterable[str]
) -> dict[str, StoredTensor]:
    """Where each parameter and persistent buffer of the model is stored."""
    expected = model.state_dict()
    index: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for stored in header.shapes:
            for name, piece in names.parameters_in(stored).items():
                # transformers ignores the others, or `check_weights` would have refused them.
                if name in expected:
                    index[name] = StoredTensor(file, stored, name in transposed, piece)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    missing = [name for name in expected if name not in index and name not in tied]
    missing += [
        target for target, origin in model.all_tied_weights_keys.items() if target not in index and origin not in index
    ]
    if missing:
        raise NotStreamableError(f"the checkpoint has no tensor {missing[0]}")
    return index


def _with_scales(
    index: Mapping[str, StoredTensor], coded: Mapping[str, Coded], headers: Mapping[Path, Header]
) -> dict[str, StoredTensor]:
    """The same places, where values are stored as codes those of the codes and of their scales."""
    homes = {name: file for file, header in headers.items() for name in header.shapes}
    found = dict(index)
    for parameter, place in index.items():
        if (one := coded.get(place.name)) is not None:
            scales = homes[one.scales], one.scales
            found[parameter] = replace(place, name=one.codes, scheme=one.scheme, scales=scales)
    return found


def read_tensors(wanted: Mapping[str, StoredTensor], pinned: bool = False) -> dict[str, Tensor | Encoded]:
    """The stored tensors, on the CPU; no file stays open or mapped. pinned: in page-locked memory."""
    scales = _read_scales(wanted, pinned)
    tensors: dict[str, Tensor | Encoded] = {}
    for file in sorted({stored.file for stored in wanted.values()}):
        held: dict[str, dict[str, StoredTensor]] = {}
        for name, stored in wanted.items():
            if stored.file == file:
                held.setdefault(stored.name, {})[name] = stored
        found = read_file(file, held, pinned)
        for stored_name, here in held.items():
            tensor = found.pop(stored_name)
            tensors |= {name: stored.values(tensor, scales.get(stored.scales)) for name, stored in here.items()}
    return tensors


def _read_scales(wanted: Mapping[str, StoredTensor], pinned: bool) -> dict[tuple[Path, str] | None, Tensor]:
    """The scales of all codes by their place, which may be in another file than that of the codes."""
    places = {stored.scales for stored in wanted.values() if stored.scales is not None}
    names: dict[Path, list[str]] = {}
    for file, name in sorted(places):
        names.setdefault(file, []).append(name)
    return {(file, name): tensor for file in names for name, tensor in read_file(file, names[file], pinned).items()}


def read_file(file: Path, names: Iterable[str] | None = None, pinned: bool = False) -> dict[str, Tensor]:
    """Tensors of one safetensors file by name (None: all), on the CPU; the file does not stay open or mapped."""
    with safe_open(file, framework="pt", **READ_OPTIONS) as opened:

        def read(name: str) -> Tensor:
            tensor = opened.get_tensor(name)
            return tensor.pin_memory() if pinned else tensor if READ_OPTIONS else tensor.clone()

        names = list(opened.keys() if names is None else names)
        if not pinned:
            return {name: read(name) for name in names}
        # Locking pages and filling them takes one thread longer than a GPU needs for a block.
        with ThreadPoolExecutor(READING_THREADS, thread_name_prefix="read") as threads:
            return dict(zip(names, threads.map(read, names), strict=True))


def fill_parameters(module: nn.Module, tensors: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Set parameters and buffers of `module` by name, floating-point ones in `dtype`; empties `tensors`.

    tensors: what is not decoded yet is, on the device.

    Those that transformers keeps in float32 are in that (lqer/models/structure.py).
    """
    for key in sorted(tensors):
        tensor = tensors.pop(key).to(device, non_blocking=True)
        owner_name, _, leaf = key.rpartition(".")
        owner = module.get_submodule(owner_name)
        wanted = torch.float32 if leaf in getattr(owner, KEPT_IN_FLOAT32, ()) else dtype
        if isinstance(tensor, Encoded):
            tensor = tensor.decode(wanted)
        elif tensor.is_floating_point():
            tensor = tensor.to(wanted)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)


def tie(model: PreTrainedModel) -> None:
    """Tie the weights that the checkpoint stores once; others stay untied, whatever config.json says."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = {name for name, tensor in parameters.items() if tensor.is_meta}
    # Before transformers ties a head's weight, it changes the head's bias, which may be tied itself.
    for name, origin in model.all_tied_weights_keys.items():
        if name in missing and origin in parameters and origin not in missing:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[origin])
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
