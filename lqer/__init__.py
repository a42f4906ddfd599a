"""lqer: post-training quantization of language models, compared at equal bits."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_quantized"]

if TYPE_CHECKING:
    from lqer.checkpoint.load import load_quantized


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: not for a command line that only has a typing error to report.
    if name == "load_quantized":
        from lqer.checkpoint.load import load_quantized

        return load_quantized
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
