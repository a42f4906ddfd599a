"""What an estimate is made from and of: a run as far as its size goes, and its stages' bytes and operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lqer.config import Config
from lqer.methods import LinearPlan
from lqer.models.summary import ModelSummary

OUTPUT_DIR = "output_dir on a larger disk"
MICRO_BATCH = "a smaller quantize.rounding.micro_batch"
SAFETENSORS = "a model in safetensors, which is read block by block"


@dataclass(frozen=True)
class Workload:
    """A run, as far as its size goes. stored, computed: bytes of a parameter on disk and in the run's dtype.

    streams: whether the model's blocks can be read one at a time. stored_in_blocks: where that is not `stored`.
    """

    config: Config
    summary: ModelSummary
    plans: dict[str, LinearPlan | None]
    stored: int
    computed: int
    on_gpu: bool
    streams: bool
    stored_in_blocks: int | None = None

    @property
    def stored_block(self) -> int:
        """Bytes of the largest block on disk."""
        return (self.stored_in_blocks or self.stored) * self.summary.block_parameters


@dataclass(frozen=True)
class Piece:
    """Bytes held at once, and the setting that makes them fewer, as a user would write it; sure unless a guess."""

    what: str
    bytes: int
    remedy: str | None = None
    sure: bool = True


@dataclass(frozen=True)
class Stage:
    """One stage. flops: floating-point operations; moved: bytes that elementwise work reads and writes; calls: of
    operations that are small and follow one another, so that their number counts and not their size.
    """

    name: str
    ram: tuple[Piece, ...]
    device: tuple[Piece, ...]
    disk: tuple[Piece, ...]
    flops: float
    moved: float
    calls: float = 0.0


def total(pieces: Sequence[Piece], sure: bool = False) -> int:
    """Their bytes; only of those that are sure, where asked."""
    return sum(piece.bytes for piece in pieces if piece.sure or not sure)


def input_sites(summary: ModelSummary) -> list[int]:
    """in_features of every input site of one block; see the module's head."""
    first = f"{summary.blocks_name}.0."
    modules: dict[str, list[int]] = {}
    for name, (_, in_features) in summary.linears.items():
        if name.startswith(first):
            modules.setdefault(name.rpartition(".")[0], []).append(in_features)
    return [width for widths in modules.values() for width in (*sorted(set(widths[:-1])), widths[-1])]


def planned(work: Workload) -> Iterator[tuple[int, int, int, LinearPlan]]:
    """(block, out_features, in_features, plan) of every linear that is quantized."""
    start = len(work.summary.blocks_name) + 1
    for name, plan in work.plans.items():
        if plan is not None:
            yield int(name[start:].split(".")[0]), *work.summary.linears[name], plan
