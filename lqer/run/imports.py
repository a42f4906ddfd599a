"""Imports of torch, transformers and what stands on them: a million objects that stay for as long as the process.

Python's garbage collector would walk through them again and again while they are made, a fifth of the time, and once
more, for a second, whenever it looks at all objects later.

They take ten seconds on some machines. What needs none of them begins beside them: a GPU is opened, a model hashed.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from lqer.run.outcome import INTERRUPTED, interrupted_at_once

if TYPE_CHECKING:
    from lqer.config import Config

# In a folder of transformers' layout.
WEIGHTS = "model*.safetensors"


@contextmanager
def heavy_imports(said: str = INTERRUPTED) -> Iterator[None]:
    """Within, nothing is collected, and Ctrl-C ends the program on the spot, with these words on stderr.

    What the first of them leaves is never looked at by the collector.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with interrupted_at_once(said):
            yield
    finally:
        # Once: a process that goes on has objects of its own by then. At its end all are looked at again, without which
        # libraries would report them as leaked.
        if gc.get_freeze_count() == 0:
            gc.freeze()
            atexit.register(gc.unfreeze)
        if was_enabled:
            gc.enable()


def open_gpu_beside(device: str) -> Thread | None:
    """Let the driver open the GPU of a run in a thread: that takes a second, in which imports go on.

    device: as in a configuration, where "auto" may name a GPU; None is returned for a CPU. What fails is not told here:
    it fails again where the GPU is used.
    """
    if device != "auto" and not device.startswith("cuda"):
        return None
    import torch

    def open_gpu() -> None:
        with suppress(Exception):
            if torch.cuda.is_available():
                torch.empty(1, device="cuda" if device == "auto" else device)

    thread = Thread(target=open_gpu, name="open-gpu", daemon=True)
    thread.start()
    return thread


def hash_model_beside(config: Config) -> None:
    """Begin to hash a local model's weights in threads, unless they are remembered. What fails is not told here."""
    from lqer.run.folder import store_path
    from lqer.store.fingerprints import FINGERPRINTS, Fingerprints

    # A name may be no path at all.
    with suppress(OSError, ValueError, RuntimeError):
        path = Path(config.model).expanduser()
        folder = path.parent if path.suffix == ".safetensors" else path
        files = [path] if path.suffix == ".gguf" else sorted(folder.glob(WEIGHTS))
        Fingerprints(store_path(config) / FINGERPRINTS).begin(files)
