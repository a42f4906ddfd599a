"""Checkpoints in the formats of other ecosystems, each read back and compared before it is called done.

    export(Path("checkpoints/tag"), CompressedTensors(), Path("out"))

A new target is a file here, imported below.
"""

from lqer.export.awq import Awq
from lqer.export.base import Target, Written
from lqer.export.compressed_tensors import CompressedTensors
from lqer.export.dense import Dense
from lqer.export.gguf import Gguf
from lqer.export.gptq import Gptq
from lqer.export.mlx import Mlx
from lqer.export.native import Native
from lqer.export.peft import Peft
from lqer.export.run import export, first_unsupported, make_target
from lqer.export.source import LinearSpec, Source
from lqer.export.verify import Check

__all__ = [
    "Awq",
    "Check",
    "CompressedTensors",
    "Dense",
    "Gguf",
    "Gptq",
    "LinearSpec",
    "Mlx",
    "Native",
    "Peft",
    "Source",
    "Target",
    "Written",
    "export",
    "first_unsupported",
    "make_target",
]
