"""The checkpoint's own files in a folder that transformers loads in a program that imports lqer.

Nothing is converted: every number format, factor, transform and rounding at run time is what the checkpoint has
(lqer/checkpoint/native.py describes the folder).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lqer.checkpoint.native import GUARD_FILE, native_config, weight_index
from lqer.checkpoint.quantizer import guard
from lqer.export.base import Target, Written, load_pretrained
from lqer.export.shards import write_tensors
from lqer.export.source import CONFIG_FILE, LinearSpec, Outline, Source
from lqer.models.coded import QUANTIZATION_CONFIG
from lqer.store.files import write_json


@dataclass(frozen=True)
class Native(Target):
    """The checkpoint itself, with everything, for transformers, vLLM and lm-eval where lqer is installed."""

    kind = "native"
    readers = ("transformers",)

    def unsupported(self, spec: LinearSpec) -> str | None:
        return None

    def unsupported_experts(self, model: Outline) -> tuple[str, str] | None:
        return None

    def keeps_activation(self, spec: LinearSpec) -> bool:
        return True

    def drops_attention(self, source: Source) -> bool:
        return False

    def write(self, source: Source, folder: Path) -> Written:
        files = source.copy_weights(folder)
        write_tensors(folder / GUARD_FILE, guard(source.specs))
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, weight_index([*files, folder / GUARD_FILE]))
        write_json(folder / CONFIG_FILE, {**source.stored_config, QUANTIZATION_CONFIG: native_config(source.details)})
        source.copy_surroundings(folder)
        return Written("exact", ("It loads only where lqer is installed and imported; elsewhere loading fails.",))

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        return load_pretrained(folder, dtype)

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        return {
            "transformers": "import lqer   # registers quant_method lqer\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{folder}", device_map="auto")',
            "vLLM": f"vllm serve {folder} --enforce-eager   # lqer's plug-in runs where lqer is installed",
            "lm-eval": f"lqer lm-eval run --model lqer --model_args pretrained={folder} --tasks arc_easy",
        }
