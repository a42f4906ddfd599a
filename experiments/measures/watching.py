"""A run in a process of its own, looked at while it works."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LOOKS_A_SECOND = 100
# In the order that they come in; what the process holds before the first one is that one's too.
STAGES = ("calibrate", "quantize", "evaluate")
# How each one's artifacts are named in the store.
ARTIFACTS = {"calibrate": "calibrate-*", "quantize": "quantize-*", "evaluate": "perplexity-*"}


def current_stage(store: Path) -> str:
    """The last stage that the store holds an artifact of, finished or in the making."""
    return next((stage for stage in reversed(STAGES) if any(store.glob(ARTIFACTS[stage]))), STAGES[0])


def watched(command: list[str], errors: Path, look: Callable[[psutil.Process], bool]) -> tuple[int, float]:
    """Run a command, look at its process again and again, and kill it once `look` says so: exit status and seconds."""
    started = time.monotonic()
    with errors.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream, cwd=ROOT)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                if look(process):
                    child.kill()
                    break
            except psutil.NoSuchProcess:
                break
            time.sleep(1 / LOOKS_A_SECOND)
        status = child.wait()
    return status, time.monotonic() - started
