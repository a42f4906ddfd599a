"""A GGUF file, for llama.cpp and the programs built on it.

Metadata (hyperparameters, tokenizer) are those of a template: any GGUF file of the original model, as llama.cpp's
convert_hf_to_gguf.py makes it. All tensors are the checkpoint's; weights are stored without loss or refused
(lqer/export/gguf_blocks.py), or dequantized as the target "dense" does. Low-rank factors are an adapter beside them
(lqer/export/gguf_adapter.py). For the rotary embedding of architecture "llama" the rows of q and k are reordered, since
llama.cpp turns neighbouring rows together.

llama.cpp rounds the inputs of quantized matrices to Q8_0 as it runs: its logits differ where the weights are equal.
Those of a file in float32 do not.

Shapes: O out_features, I in_features, P bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lqer.components import require_choice
from lqer.errors import ConfigError, ModelError
from lqer.export.base import Target, Written, load_pretrained, unsupported_basis, unsupported_transposed
from lqer.export.dense import dense_closeness, effective_weight
from lqer.export.gguf_adapter import ADAPTER_FILE, merge_adapter, write_adapter
from lqer.export.gguf_blocks import blocks_of, unsupported_blocks
from lqer.export.gguf_names import GgufNames
from lqer.export.source import CONFIG_FILE, LinearSpec, Outline, Source
from lqer.models.gguf_header import check_gguf
from lqer.models.source import DTYPES
from lqer.store.files import write_json

MODEL_FILE = "model.gguf"
ARCHITECTURE = gguf.Keys.General.ARCHITECTURE
# The writer sets the one; the other says how the template's weights were quantized.
NOT_COPIED = (ARCHITECTURE, gguf.Keys.General.FILE_TYPE)
# Not a field of the file but what the reader makes of its header.
VIRTUAL_PREFIX = "GGUF."
PLAIN_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
ROPE_PREFIX = "rope_"
# Metadata of a template, without the architecture, and what config.json calls it.
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
}


@dataclass(frozen=True)
class Gguf(Target):
    """GGUF, for llama.cpp.

    template: a GGUF file of the original model, for its metadata and tokenizer.
    dtype: of dequantized weights, with factors merged and rotations folded; by default they stay quantized.
    """

    kind = "gguf"
    readers = ("gguf",)
    library_name = "gguf"
    tags = ("gguf",)

    template: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, [None, *DTYPES], self.kind)

    def unsupported(self, spec: LinearSpec) -> str | None:
        return None if self.dtype else unsupported_basis(spec) or unsupported_blocks(spec)

    @property
    def most_bits(self) -> float:
        return 8.0 * DTYPES[self.dtype].itemsize if self.dtype else super().most_bits

    def unsupported_model(self, model: Outline) -> tuple[str, str] | None:
        return unsupported_transposed(model)

    def check_inputs(self) -> None:
        self._reader()

    def write(self, source: Source, folder: Path) -> Written:
        reader = self._reader()
        architecture = str(reader.fields[ARCHITECTURE].contents())
        _refuse_other_model(reader, architecture, source.config)
        names = GgufNames(architecture, source.blocks, source.config)
        # Tensors wait in a file: their descriptions come before them all.
        writer = gguf.GGUFWriter(folder / MODEL_FILE, architecture, use_temp_file=True)
        _copy_metadata(reader, writer)
        types, is_exact = set[str](), True
        for linears, others in source.read():
            for linear in linears:
                others |= linear.biases
                if self.dtype is not None:
                    weight_OI = effective_weight(linear)
                    others[f"{linear.name}.weight"] = weight_OI.to(DTYPES[self.dtype])
                    is_exact &= torch.equal(others[f"{linear.name}.weight"].to(torch.float32), weight_OI)
                    continue
                block_type, rows_OP = blocks_of(linear.weight_OI, linear.spec)
                types.add(block_type.name)
                rows_OP = names.ordered(f"{linear.name}.weight", rows_OP)
                writer.add_tensor(names.of(f"{linear.name}.weight"), rows_OP.numpy(), raw_dtype=block_type)
            for name, tensor in others.items():
                _add_plain(writer, names.of(name), names.ordered(name, tensor))
        for copied in reader.tensors:
            # What stands for a configuration's scaling of rotary frequencies; no checkpoint has it.
            if copied.name.startswith(ROPE_PREFIX):
                writer.add_tensor(copied.name, copied.data, raw_dtype=copied.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        # What the comparison, and transformers, read beside the file.
        write_json(folder / CONFIG_FILE, source.config)
        source.copy_surroundings(folder)
        if self.dtype is not None:
            return dense_closeness(source, self.dtype, is_exact)
        notes = (
            f"Weights are stored as {', '.join(sorted(types))} without loss.",
            "llama.cpp rounds the inputs of these matrices to 8 bits as it runs, so its logits differ.",
        )
        if not any(spec.rank for spec in source.specs.values()):
            return Written("exact", notes)
        write_adapter(folder / ADAPTER_FILE, names, (linear for linears, _ in source.read() for linear in linears))
        return Written("reordered", (*notes, f"The low-rank factors are in {ADAPTER_FILE}."))

    def _reader(self) -> gguf.GGUFReader:
        if self.template is None:
            raise ConfigError(
                "export: gguf needs a GGUF file of the original model: --template=FILE.gguf, or in export.targets "
                '{ kind = "gguf", template = "FILE.gguf" }'
            )
        path = Path(self.template).expanduser()
        if not path.is_file():
            raise ConfigError(f"export: template: no such file: {path}")
        try:
            check_gguf(path)
        except ModelError as error:
            raise ConfigError(f"export: template: {str(error).removeprefix('model: ')}") from None
        return gguf.GGUFReader(path)

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        model = load_pretrained(folder, dtype, gguf_file=MODEL_FILE)
        if (folder / ADAPTER_FILE).is_file():
            architecture = str(gguf.GGUFReader(folder / ADAPTER_FILE).fields[ARCHITECTURE].contents())
            config = model.config.to_dict()
            merge_adapter(model, folder / ADAPTER_FILE, GgufNames(architecture, config["num_hidden_layers"], config))
        return model

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        has_adapter = self.dtype is None and any(spec.rank for spec in source.specs.values())
        adapter = f" --lora {folder}/{ADAPTER_FILE}" if has_adapter else ""
        return {"llama.cpp": f'llama-cli -m {folder}/{MODEL_FILE}{adapter} -p "Once upon a time"'}


def _refuse_other_model(reader: gguf.GGUFReader, architecture: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a template whose sizes are not the checkpoint's."""
    for key, name in SIZES.items():
        field = reader.fields.get(f"{architecture}.{key}")
        if field is not None and name in config and field.contents() != config[name]:
            found, wanted = field.contents(), config[name]
            raise ConfigError(f"export: template is of another model: its {key} is {found}, the checkpoint's {wanted}")


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """All fields of the template but those that the writer sets."""
    for field in reader.fields.values():
        if field.name in NOT_COPIED or field.name.startswith(VIRTUAL_PREFIX):
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if is_array else None)


def _add_plain(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """A tensor that is not quantized, in its own dtype; vectors in float32, as llama.cpp wants them."""
    tensor = tensor.float() if tensor.ndim == 1 else tensor
    raw = tensor.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=PLAIN_TYPES[tensor.dtype])
