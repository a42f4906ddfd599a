"""What this machine can do: bytes per second of its disk, hash and memory, operations per second of its products.

Each rate is the best of a few repeats, of a size that takes a fraction of a second on the machine that it is for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from measures.seconds import least_seconds
from torch import Tensor

REPEATS = 3
CHUNK_BYTES = 1 << 24
# Bytes of a file that is written and read, of tensors that are copied; the sides of the matrices of a product.
SMALLEST_FILE, LARGEST_FILE = 1 << 26, 1 << 30
COPIED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
SIDES = {"cpu": 1024, "cuda": 8192}
SIDES_FLOAT64 = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Rates:
    """Bytes per second of files from disk and from the page cache, of writing with fsync, of BLAKE3 in all threads, of
    copies within the device's memory (read and written) and from the host to it; operations per second of products in
    the run's dtype, float32 and float64; seconds that a process takes to import torch and a model's class.
    """

    read: float
    reread: float
    write: float
    hash: float
    copy: float
    to_device: float
    product: float
    product32: float
    product64: float
    imports: float


def measure(folder: Path, model_bytes: int, device: torch.device, dtype: torch.dtype) -> Rates:
    """folder: on the disk that runs write to, where a file of the size of the model is written, up to LARGEST_FILE."""
    read, reread, write = _disk_rates(folder / "rates", min(max(model_bytes, SMALLEST_FILE), LARGEST_FILE), device)
    on_device = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    on_host = torch.zeros(len(on_device), dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(on_device)
    return Rates(
        read=read,
        reread=reread,
        write=write,
        hash=len(on_host) / _seconds(lambda: _hash(on_host), device),
        copy=2 * on_device.nbytes / _seconds(lambda: target.copy_(on_device), device),
        to_device=on_device.nbytes / _seconds(lambda: target.copy_(on_host, non_blocking=True), device),
        product=_product_rate(device, dtype, SIDES[device.type]),
        product32=_product_rate(device, torch.float32, SIDES[device.type]),
        product64=_product_rate(device, torch.float64, SIDES_FLOAT64[device.type]),
        imports=_import_seconds(),
    )


def evict(file: Path) -> None:
    """Drop a file's pages from the system's cache, so that the next reader gets them from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def describe(rates: Rates) -> str:
    return (
        f"read {rates.read / 1e9:.2f} GB/s (cached {rates.reread / 1e9:.2f}), write {rates.write / 1e9:.2f} GB/s, "
        f"hash {rates.hash / 1e9:.2f} GB/s, copy {rates.copy / 1e9:.1f} GB/s, to the device "
        f"{rates.to_device / 1e9:.1f} GB/s, products {rates.product / 1e12:.3g} TFLOP/s (float32 "
        f"{rates.product32 / 1e12:.3g}, float64 {rates.product64 / 1e12:.3g}), imports {rates.imports:.1f} s"
    )


def _disk_rates(file: Path, size: int, device: torch.device) -> tuple[float, float, float]:
    """Bytes per second of reading from disk, of reading what is cached, and of writing."""
    chunk = os.urandom(CHUNK_BYTES)
    try:
        started = time.perf_counter()
        with file.open("wb", buffering=0) as opened:
            for _ in range(size // CHUNK_BYTES):
                opened.write(chunk)
            os.fsync(opened.fileno())
        written = time.perf_counter()
        evict(file)
        evicted = time.perf_counter()
        _read(file)
        from_disk = time.perf_counter() - evicted
        return size / from_disk, size / _seconds(lambda: _read(file), device), size / (written - started)
    finally:
        file.unlink(missing_ok=True)


def _read(file: Path) -> None:
    buffer = bytearray(CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def _hash(data: Tensor) -> str:
    return blake3(data.numpy().data, max_threads=blake3.AUTO).hexdigest()


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _seconds(lambda: a @ a, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of REPEATS, after one that warms up."""
    return least_seconds(work, REPEATS, device)[0]


def _import_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch; from transformers import PreTrainedModel"], check=True)
    return time.perf_counter() - started
