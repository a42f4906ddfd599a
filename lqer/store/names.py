"""Names of the files of an artifact that has one file per decoder block, or per batch of windows."""

from __future__ import annotations


def block_file(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def layers_file(index: int) -> str:
    return f"layers-{index:05d}.json"


def spectra_file(index: int) -> str:
    return f"spectra-{index:05d}.safetensors"


def tuning_file(index: int) -> str:
    return f"tuning-{index:05d}.json"


def distribution_file(batch: int) -> str:
    """Of a batch of windows, not of a block."""
    return f"distribution-{batch:05d}.safetensors"


def sites_file(index: int) -> str:
    return f"sites-{index:05d}.json"
