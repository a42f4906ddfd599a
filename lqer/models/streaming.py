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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lqer.models.auto import auto_class, without_values
from lqer.models.coded import Coded, coded_tensors, plain_config, plain_header
from lqer.models.files import Header, processor_files, read_header, reported_as, tensor_bytes, weight_files
from lqer.models.loaders import OpenedModel, Streamed
from lqer.models.reading import Place, StoredBlock, StoredTensor, StoredTensors, fill_parameters
from lqer.models.source import ModelSource, check_weights, load_model, load_model_config
from lqer.models.stored import NotStreamableError, StoredNames
from lqer.models.structure import find_blocks, prepare_model
from lqer.models.verify import STORED_DTYPES
from lqer.nn.stacked import Piece
from lqer.store.offload import Offload

log = logging.getLogger(__name__)


def open_model(
    source: ModelSource, dtype: torch.dtype | str, device: torch.device, offload: Offload | None = None
) -> OpenedModel:
    """The model with blocks that are read one at a time to `device`; in memory where that is not possible.

    dtype: of the parameters, "auto" for the checkpoint's own. Raises ModelError as `load_model` does.
    """
    check_weights(source)
    try:
        return open_streamed(source, dtype, device, offload or Offload())
    except NotStreamableError as reason:
        log.info("%s: loading the whole model, not block by block: %s", source.name, reason)
    opened = OpenedModel.resident(load_model(source, dtype, torch.device("cpu")), device, offload or Offload())
    return replace(opened, processor=processor_files(source.find))


def open_streamed(source: ModelSource, dtype: torch.dtype | str, device: torch.device, offload: Offload) -> OpenedModel:
    """The model with blocks that are read one at a time. Raises NotStreamableError where that is not possible."""
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
    target, on_gpu = model.dtype, device.type == "cuda"

    def read(block: int) -> StoredTensors:
        prefix = f"{inside}{block}."
        wanted = {key.removeprefix(prefix): stored for key, stored in index.items() if key.startswith(prefix)}
        return StoredTensors(wanted, pinned=on_gpu, ahead=on_gpu)

    def fill(block: nn.Module, _: int, tensors: StoredTensors, where: torch.device) -> None:
        fill_parameters(block, tensors, where, target)

    def values(block: nn.Module, tensors: StoredTensors) -> StoredBlock:
        return StoredBlock(block, tensors, device, target)

    def fill_outer() -> None:
        fill_parameters(model, StoredTensors(outside, pinned=on_gpu), torch.device("cpu"), target)
        tie(model)

    loader = Streamed(read, fill, fill_outer, ahead=on_gpu, values=values)
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
    transposed = frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))
    prepare_model(model)
    if model.can_generate():
        _load_generation_config(model, source)
    return model.eval(), names, transposed


def _load_generation_config(model: PreTrainedModel, source: ModelSource) -> None:
    """Load it as from_pretrained does: from its own file, else from the generation options in config.json."""
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
                    index[name] = _stored(file, header, stored, piece, name in transposed)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    missing = [name for name in expected if name not in index and name not in tied]
    missing += [
        target for target, origin in model.all_tied_weights_keys.items() if target not in index and origin not in index
    ]
    if missing:
        raise NotStreamableError(f"the checkpoint has no tensor {missing[0]}")
    return index


def _stored(file: Path, header: Header, name: str, piece: Piece | None, transposed: bool = False) -> StoredTensor:
    """piece: of the stack of that name, of which one expert is read."""
    size = tensor_bytes(header, name)
    if piece is None or piece.groups:
        return StoredTensor(Place(file, name), size, transposed, piece)
    experts = header.shapes[name][0]
    return StoredTensor(Place(file, name, piece.expert), size // experts, transposed, piece)


def _with_scales(
    index: Mapping[str, StoredTensor], coded: Mapping[str, Coded], headers: Mapping[Path, Header]
) -> dict[str, StoredTensor]:
    """The same places, where values are stored as codes those of the codes and of their scales."""
    homes = {name: file for file, header in headers.items() for name in header.shapes}
    found = dict(index)
    for parameter, stored in index.items():
        if (one := coded.get(stored.place.name)) is not None:
            header, home = headers[stored.place.file], homes[one.scales]
            codes = _stored(stored.place.file, header, one.codes, stored.piece)
            # All matrices of a stack may share one scale.
            of_scales, experts = headers[home].shapes[one.scales], header.shapes[one.codes][0]
            expert = codes.place.expert if len(of_scales) > 1 and of_scales[0] == experts else None
            found[parameter] = replace(codes, scheme=one.scheme, scales=Place(home, one.scales, expert))
    return found


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
