"""The sizes of a run, from which its memory and disk are estimated, and the form of such an estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lqer.config import Config
from lqer.methods import LinearPlan
from lqer.models.summary import ModelSummary
from lqer.resources.statistics import input_sites, keeps_statistics


@dataclass(frozen=True)
class Need:
    """Bytes held at once. remedy: the change of the configuration that reduces them; certain: not an estimate."""

    what: str
    bytes: int
    remedy: str | None = None
    certain: bool = True


@dataclass(frozen=True)
class StageMemory:
    """The needs of one stage, in RAM, in GPU memory and on disk."""

    name: str
    ram: tuple[Need, ...]
    device: tuple[Need, ...]
    disk: tuple[Need, ...]


@dataclass(frozen=True)
class Workload:
    """The sizes of a run. stored, computed: bytes of a parameter on disk and in the run's dtype.

    streams: whether the model can be read block by block. stored_in_blocks: `stored` of the blocks, where it differs.
    read_block: bytes of the largest block's files, which may hold codes; None for as many as of its values. near_bytes:
    memory of the GPU whose small part hidden states may take (lqer/models/hidden.py); 0 where they are in RAM.
    """

    config: Config
    summary: ModelSummary
    plans: dict[str, LinearPlan | None]
    stored: int
    computed: int
    on_gpu: bool
    streams: bool
    stored_in_blocks: int | None = None
    read_block: int | None = None
    near_bytes: int = 0

    @property
    def stored_block(self) -> int:
        """Bytes of the largest block on disk."""
        return (self.stored_in_blocks or self.stored) * self.summary.block_parameters

    @property
    def stores_statistics(self) -> bool:
        """Whether a stage of its own gathers statistics, and stores them; else the one that quantizes does."""
        keeps = keeps_statistics(self.config, self.summary, self.plans, self.computed)
        return keeps and not self.config.quantize.propagates_error

    @property
    def widest(self) -> int:
        """Values per token of a block's input and of the widest linear's."""
        return self.summary.hidden_size + max(input_sites(self.summary))


def total(needs: Sequence[Need], certain: bool = False) -> int:
    """The bytes of needs; if `certain`, without estimates."""
    return sum(need.bytes for need in needs if need.certain or not certain)
