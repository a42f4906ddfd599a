"""What steps of whole blocks hold and take: AWQ's search, learnt clipping, adaptive rounding."""

from __future__ import annotations

from dataclasses import dataclass

from lqer.resources.walk import LIVE_ACTIVATIONS
from lqer.resources.workload import MICRO_BATCH, OUTPUT_DIR, Piece, Workload, input_sites, planned
from lqer.rounding import Adaptive
from lqer.transforms import Awq, Lwc

# Bytes a weight that adaptive rounding takes beside it (lqer/rounding/adaptive.py), and learnt clipping, nearly.
LEARNT_BYTES = 40
# Bytes a weight of a state on disk: v, the weight that transforms changed, its code; the next is written beside it.
STATE_BYTES = 2 * (4 + 4 + 1)


@dataclass(frozen=True)
class BlockSteps:
    """What is done to whole blocks before their linears are quantized one by one; nothing, without such parts."""

    work: Workload

    def host(self) -> list[Piece]:
        calibration, summary = self.work.config.calibration, self.work.summary
        states = calibration.num_samples * calibration.seq_len * summary.hidden_size * self.work.computed
        needed = bool(self.work.config.quantize.block_parts)
        return [Piece("hidden states of the original", states * needed, "a smaller calibration.max_memory")]

    def device(self) -> list[Piece]:
        summary, sequences = self.work.summary, self._sequences_learnt_on()
        if not self.work.config.quantize.block_parts:
            return []
        learnt = LEARNT_BYTES * summary.block_parameters if sequences else 0
        width = summary.hidden_size + max(input_sites(summary))
        kept = LIVE_ACTIVATIONS * self._micro_batch() * self.work.config.calibration.seq_len * width * 4
        return [
            Piece("a block in float32", 4 * summary.block_parameters),
            Piece("what is learnt of a block", learnt, sure=False),
            Piece("activations kept for gradients", kept if sequences else 0, MICRO_BATCH, sure=False),
        ]

    def disk(self) -> list[Piece]:
        kept = STATE_BYTES * self.work.summary.block_parameters if self._sequences_learnt_on() else 0
        return [Piece("states of a block", kept, OUTPUT_DIR, sure=False)]

    def flops(self) -> float:
        settings = self.work.config.calibration
        weights = sum(rows * columns for _, rows, columns, _ in planned(self.work))
        compared = sum(
            part.ratios * min(part.samples, settings.num_samples)
            for part in self.work.config.quantize.transforms
            if isinstance(part, Awq)
        )
        return float(weights * settings.seq_len) * (2 * compared + 6 * self._sequences_learnt_on())

    def _micro_batch(self) -> int:
        rounding = self.work.config.quantize.rounding
        return (rounding.micro_batch or rounding.batch_size) if isinstance(rounding, Adaptive) else 1

    def _sequences_learnt_on(self) -> int:
        """How many sequences pass a block, forward and backward."""
        quantize, samples = self.work.config.quantize, self.work.config.calibration.num_samples
        sequences = sum(part.epochs * samples for part in quantize.transforms if isinstance(part, Lwc))
        if isinstance(quantize.rounding, Adaptive):
            bits = min(plan.weight.stream_widths["codes"] for _, _, _, plan in planned(self.work))
            settings = quantize.rounding.settings(bits, None, 0)
            sequences += len(settings.soft_fractions) * settings.steps * min(settings.batch_size, samples)
        return sequences
