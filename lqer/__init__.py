"""lqer: post-training quantization of language models, compared at equal bits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lqer.checkpoint.registration import register

__version__ = "0.1.0"
__all__ = ["__version__", "compile_decode", "load_plugin", "load_quantized", "quantize"]

if TYPE_CHECKING:
    from lqer.checkpoint.decode import compile_decode
    from lqer.checkpoint.load import load_quantized

# Imported when used: torch and transformers take seconds, too long for a command line that only reports a typing error.
_MODULES = {
    "compile_decode": "lqer.checkpoint.decode",
    "load_plugin": "lqer.config.plugins",
    "load_quantized": "lqer.checkpoint.load",
    "quantize": "lqer.run.call",
}

register()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What a notebook completes."""
    return __all__
