"""What a walk through the decoder blocks holds and takes: windows, blocks, and the statistics of their inputs."""

from __future__ import annotations

from dataclasses import dataclass

from lqer.resources.workload import OUTPUT_DIR, SAFETENSORS, Piece, Workload, input_sites
from lqer.stages.quantize import requested_statistics
from lqer.statistics import Hessian

# How many other activations of a batch live at once, a guess.
LIVE_ACTIVATIONS = 5
# What elementwise work moves, in passes over its data: norms and gates, statistics.
BLOCK_PASSES, STATISTICS_PASSES = 12, 6


@dataclass(frozen=True)
class Walk:
    """Windows on their way through the blocks."""

    work: Workload
    windows: int
    seq_len: int
    batch_size: int
    batch_tokens: int | None = None
    batch_remedy: str = "a smaller calibration.batch_size"

    def memory(self, accumulated: int = 0, blocks: int = 1) -> tuple[list[Piece], list[Piece], list[Piece]]:
        """Host, device and disk. accumulated: bytes of statistics in the making; blocks: how many are held."""
        work, summary = self.work, self.work.summary
        limit = work.config.calibration.max_bytes
        states = self.windows * self.seq_len * summary.hidden_size * work.computed
        # Only what lies in RAM can be spilled.
        spillable = {"hidden states": states, "statistics in the making": 0 if work.on_gpu else accumulated}
        held = sum(spillable.values()) if limit is None else min(sum(spillable.values()), limit)
        what = max(spillable, key=lambda name: spillable[name])
        host = [Piece(what, held, "a smaller calibration.max_memory")]
        disk = [Piece(f"{what}, spilled", sum(spillable.values()) - held, OUTPUT_DIR)]
        device = self.activations()
        if work.streams:
            device.append(Piece("what surrounds the blocks", work.computed * summary.outside_parameters))
            device.append(Piece("a block", blocks * work.computed * summary.block_parameters))
            if work.on_gpu:
                host.append(Piece("two blocks as stored", 2 * work.stored_block))
        else:
            # It stays in RAM; a block is on the GPU for its visit.
            host.append(Piece("the whole model", work.computed * summary.parameters, SAFETENSORS))
            on_gpu = blocks * summary.block_parameters + summary.outside_parameters
            device.append(Piece("a block and what surrounds them", work.computed * on_gpu if work.on_gpu else 0))
        if work.on_gpu:
            device.append(Piece("statistics in the making", accumulated, 'device = "cpu"'))
        return host, device, disk

    def activations(self) -> list[Piece]:
        """What reaches the widest linear while its block's input is kept, and what else lives at that time."""
        tokens = self.batch_size * self.seq_len if self.batch_tokens is None else self.batch_tokens
        width = self.work.summary.hidden_size + max(input_sites(self.work.summary))
        size = tokens * width * self.work.computed
        others = Piece("other activations of a batch", LIVE_ACTIVATIONS * size, self.batch_remedy, sure=False)
        return [Piece("activations of a batch", size, self.batch_remedy), others]

    def cost(self, tokens: int) -> tuple[float, float]:
        """FLOPs, and bytes moved, of that many tokens through all blocks."""
        summary = self.work.summary
        weights = sum(rows * columns for rows, columns in summary.linears.values())
        attention = 4 * self.seq_len * summary.hidden_size * summary.blocks
        width = summary.hidden_size + max(input_sites(summary))
        moved = BLOCK_PASSES * width * self.work.computed * summary.blocks
        return float(tokens * (2 * weights + attention)), float(tokens * moved)


def gathers_products(work: Workload) -> bool:
    return Hessian() in requested_statistics(work.plans)


def accumulators(work: Workload) -> int:
    """Statistics in the making: float64, of all sites of a block at once."""
    widths = input_sites(work.summary)
    return sum(12 * width + (8 * width**2 if gathers_products(work) else 0) for width in widths)


def statistics_bytes(work: Workload) -> int:
    """Bytes of one block's file of statistics."""
    kept = work.config.calibration.error_tokens
    products = gathers_products(work)
    return sum(
        8 * width + kept * width * work.computed + (4 * width**2 if products else 0)
        for width in input_sites(work.summary)
    )


def observing_flops(work: Workload, tokens: int) -> float:
    sites = input_sites(work.summary)
    return float(work.summary.blocks * tokens * sum(2 * i**2 for i in sites)) if gathers_products(work) else 0.0


def observing_bytes(work: Workload, tokens: int) -> float:
    return float(STATISTICS_PASSES * 4 * tokens * sum(input_sites(work.summary)) * work.summary.blocks)
