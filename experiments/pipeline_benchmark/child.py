"""Runs of the pipeline, in this process, that record their phases.

    python -m pipeline_benchmark.child SECONDS.json CONFIG [--section.key=value ...]

The mathematics imports nothing of the pipeline and opens no phases of its own: its functions are wrapped here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import lqer.cli
from lqer.phases import Recorder, in_phase, phase, recorded
from lqer.run.imports import heavy_imports
from lqer.run.outcome import INTERRUPTED, leave

# By phase, functions as module and name. Where other modules have imported one by its name, it is replaced there too.
FUNCTIONS = {
    "factor": [
        ("lqer.rounding.hessian", "damp"),
        ("lqer.rounding.hessian", "down_date"),
        ("lqer.rounding.factor", "inverse_factor"),
    ],
    "reconstruct": [("lqer.methods.base", "reconstruct_rounded"), ("lqer.lowrank.solver", "reconstruct"),
                    ("lqer.lowrank.lplr", "lplr")],
}  # fmt: skip


def main(arguments: list[str]) -> int:
    out, *rest = arguments
    started = time.perf_counter()
    recorder = Recorder(_synchronize)
    # The command imports in its own order, with other work beside it.
    lqer.cli.heavy_imports = measured_imports
    with recorded(recorder):
        status = lqer.cli.main(rest, usage=__doc__ or "")
    seconds = {"main": recorder.main, "background": recorder.background, "wall": time.perf_counter() - started}
    Path(out).write_text(json.dumps(seconds))
    return status


@contextmanager
def measured_imports(said: str = INTERRUPTED) -> Iterator[None]:
    with phase("imports"), heavy_imports(said):
        yield
        _wrap_mathematics()


def _synchronize() -> None:
    torch: Any = sys.modules.get("torch")
    # Before the library is whole there is nothing to wait for.
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        # This thread's work alone: waiting for that of others, as spectra of a block before, would end their overlap.
        torch.cuda.current_stream().synchronize()


@cache
def _wrap_mathematics() -> None:
    """Once: the runs of one process share what is wrapped."""
    for name, functions in FUNCTIONS.items():
        for module, function in functions:
            original = getattr(import_module(module), function)
            _replace_everywhere(original, in_phase(name)(original))


def _replace_everywhere(original: Any, replacement: Any) -> None:
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "lqer"]:
        for name in [name for name, value in vars(module).items() if value is original]:
            setattr(module, name, replacement)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
