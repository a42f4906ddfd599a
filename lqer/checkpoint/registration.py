"""Makes lqer known to the libraries that load models by name, in a program that imports both.

Importing those libraries takes seconds, so nothing is imported here: lqer registers at once with those that have been
imported, with the others as soon as somebody imports them.

    transformers   quant_method "lqer": `from_pretrained` loads the native form of a checkpoint (native.py)
    lm-eval        the model "lqer": `simple_evaluate(model="lqer", model_args={"pretrained": FOLDER})`
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _tell_transformers() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer

    from lqer.checkpoint.quantizer import QUANT_METHOD, LqerConfig, LqerQuantizer

    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LqerConfig)
        register_quantizer(QUANT_METHOD)(LqerQuantizer)


def _tell_lm_eval() -> None:
    from lm_eval.api.registry import model_registry

    if "lqer" not in model_registry:
        # A placeholder: the library imports it when the model is asked for.
        model_registry.register("lqer", target="lqer.export.lm_eval:LqerLM")


# Keys are the modules that must have been imported before.
LISTENERS = {"transformers.quantizers.auto": _tell_transformers, "lm_eval.models": _tell_lm_eval}


class AfterImport:
    """A finder of modules (sys.meta_path) that finds what the others do, and calls a listener once it is imported."""

    def __init__(self, listeners: dict[str, Callable[[], None]]):
        self._waiting = dict(listeners)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        # It no longer waits for the name when it asks the other finders, itself among them.
        listener = self._waiting.pop(name, None)
        spec = None if listener is None else importlib.util.find_spec(name)
        if listener is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            listener()

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Tell the libraries that have been imported, and the others when they are."""
    absent = {}
    for name, listener in LISTENERS.items():
        if name in sys.modules:
            listener()
        else:
            absent[name] = listener
    sys.meta_path.insert(0, AfterImport(absent))
