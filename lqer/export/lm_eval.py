"""The model "lqer" of lm-eval: a run's folder, its checkpoint or the native form of one, as the library's own HFLM.

registration.py of lqer/checkpoint tells the library of it; `lqer lm-eval` is its command line with that done.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, PretrainedConfig

from lqer.checkpoint.load import load_quantized
from lqer.errors import ModelError
from lqer.evaluation.adapter import without_quantization
from lqer.models.open import DevicePlacement
from lqer.models.source import DTYPES
from lqer.store.names import checkpoint_in


class LqerLM(HFLM):
    """HFLM on `load_quantized(pretrained, device, dtype, backend, device_map)`; other options are HFLM's.

    Log-probabilities are taken in float32, as lqer takes them, unless `softmax_dtype` says otherwise.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        backend: str = "auto",
        device_map: DevicePlacement = "single",
        tokenizer: str | None = None,
        **options: Any,
    ):
        folder = checkpoint_in(Path(pretrained))
        if dtype not in (None, "auto", *DTYPES):
            raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        if device_map not in get_args(DevicePlacement):
            raise ModelError(f"device_map {device_map!r} is not one of {', '.join(get_args(DevicePlacement))}")
        model = load_quantized(folder, device or "auto", DTYPES.get(dtype or ""), backend, device_map)
        options = {"softmax_dtype": "float32", **options}
        super().__init__(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tokenizer or folder), **options)

    @cached_property
    def config(self) -> PretrainedConfig:
        return without_quantization(self._config)
