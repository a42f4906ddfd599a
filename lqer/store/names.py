"""Names of the files of an artifact that has one per decoder block, or per batch of windows, and of the link to it."""

from __future__ import annotations

from pathlib import Path

# Within the folder of a run.
CHECKPOINT_LINK = "checkpoint"
# Begins the names of the files of decoder blocks, each of which is written when the rest of its block is.
BLOCK = "block-"


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint of the run whose folder that is; else the folder itself."""
    return folder / CHECKPOINT_LINK if (folder / CHECKPOINT_LINK).is_dir() else folder


def block_file(index: int) -> str:
    return f"{BLOCK}{index:05d}.safetensors"


def layers_file(index: int) -> str:
    return f"layers-{index:05d}.json"


def spectra_file(index: int) -> str:
    return f"spectra-{index:05d}.safetensors"


def tuning_file(index: int) -> str:
    return f"tuning-{index:05d}.json"


def distribution_file(batch: int) -> str:
    """The file of a batch of windows, not of a block."""
    return f"distribution-{batch:05d}.safetensors"


def token_weights_file(batch: int) -> str:
    """The file of a batch of windows, not of a block."""
    return f"tokens-{batch:05d}.safetensors"


def sites_file(index: int) -> str:
    return f"sites-{index:05d}.json"


def linears_prefix(index: int) -> str:
    """Begins the names of files that hold single linears of a block until it is written."""
    return f"linears-{index:05d}-"


def linears_file(index: int, unit: str) -> str:
    """The packed tensors of some linears of a block, called by the name of one, or of the module that has them all."""
    return f"{linears_prefix(index)}{unit}.safetensors"


def linears_rows_file(index: int, unit: str) -> str:
    return f"{linears_prefix(index)}{unit}.json"


# Beginnings of the names of files that hold a part of an evaluation until all are there.
LOSSES, SCORES = "losses", "scores"


def losses_file(first: int, last: int) -> str:
    """The losses of windows, of the batches `first` to `last`."""
    return f"{LOSSES}-{first:05d}-{last:05d}.safetensors"


def scores_file(index: int, count: int) -> str:
    """The scores of the requests of one of `count` shares."""
    return f"{SCORES}-{index:05d}-of-{count:05d}.safetensors"
