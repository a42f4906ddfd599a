"""Heavy imports: what they leave is no work for the collector; a GPU is opened and a model hashed beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lqer.config import Config
from lqer.run.imports import hash_model_beside, open_gpu_beside
from lqer.store import fingerprints

# In a process of its own: objects of this one would never be collected again.
COUNTS = """
import gc
from lqer.run.imports import heavy_imports
with heavy_imports():
    assert not gc.isenabled()
    import json.tool, decimal
assert gc.isenabled()
print(gc.get_freeze_count(), len(gc.get_objects()))
class Circle: pass
for number in range(3):
    circle = Circle()
    circle.itself = circle
frozen = gc.get_freeze_count()
with heavy_imports():
    pass
assert gc.get_freeze_count() == frozen
print(gc.collect())
"""


def test_the_collector_leaves_alone_what_the_first_imports_made_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True, check=True)
    (frozen, others), (collected,) = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    assert frozen > 1000 > others
    assert collected >= 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_gpu_is_opened_for_another_device(device):
    assert open_gpu_beside(device) is None


def test_a_gpu_that_cannot_be_opened_is_left_to_whoever_uses_it():
    thread = open_gpu_beside("cuda:99")
    assert thread is not None
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (".", ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]),
        ("model-2-of-2.safetensors", ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]),
        ("model.gguf", ["model.gguf"]),
        ("missing", []),
        ("demo:stories260k", []),
        ("a\0", []),
    ],
)
def test_weights_of_a_local_model_are_hashed_beside_imports(model, names, tmp_path, monkeypatch):
    hashed: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fingerprints, "hash_file", lambda file: hashed.append(file.name))
    for name in ("model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.gguf", "consolidated.safetensors"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    hash_model_beside(Config.model_construct(model=model, output_dir=str(tmp_path / "out")))
    for future in [future for (path, _), future in fingerprints._begun.items() if Path(path).parent == tmp_path]:
        future.result()
    assert sorted(hashed) == names
