"""The stages of one run, in their order; lqer/run/plan.py makes them from a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lqer.stages.base import Stage
from lqer.stages.calibrate import Calibrate
from lqer.stages.divergence import OriginalDistributions, WindowDivergence
from lqer.stages.evaluate import Candidate, DecodeSpeed, Evaluation, TaskAccuracy
from lqer.stages.finetune import Finetune
from lqer.stages.measure_spectra import MeasureSpectra
from lqer.stages.measure_widths import MeasureWidths
from lqer.stages.quantize import Quantize
from lqer.stages.quantize_sequential import QuantizeSequentially
from lqer.stages.rotate import Rotate
from lqer.stages.weigh_tokens import WeighTokens
from lqer.store.store import Artifact, Store

QuantizeStage = Quantize | QuantizeSequentially


@dataclass(frozen=True)
class Experiment:
    """What a run does, in this order; None where the configuration does not ask for a stage.

    token_weights: of tokens by the gradient. calibrate: None also where statistics are gathered by the stages that read
    them.
    rtn: the checkpoint without low-rank reconstruction. perplexity and downstream: by role of the candidate, in the
    order of the configuration's texts and tasks. distributions: the original's, by text; divergence: that of the other
    candidates from them. Both are empty unless asked for.
    """

    rotate: Rotate | None
    token_weights: WeighTokens | None
    calibrate: Calibrate | None
    spectra: MeasureSpectra | None
    widths: MeasureWidths | None
    quantize: QuantizeStage
    rtn: QuantizeStage | None
    finetune: Finetune | None
    candidates: tuple[Candidate, ...]
    perplexity: dict[str, list[Evaluation]]
    distributions: list[OriginalDistributions]
    divergence: dict[str, list[WindowDivergence]]
    downstream: dict[str, TaskAccuracy]
    decode: dict[str, DecodeSpeed]

    @property
    def checkpoint(self) -> QuantizeStage | Finetune:
        """The stage whose artifact is the result of the run."""
        return self.finetune or self.quantize

    def verify_unread(self, checkpoint: Artifact, store: Store) -> None:
        """Check the files of the result, unless an evaluation is missing, which checks them as it reads them."""
        quantized = (candidate for candidate in self.candidates if candidate.role == "quantized")
        if all(stage.find(store) is not None for candidate in quantized for stage in self.evaluations(candidate)):
            checkpoint.verify()

    @property
    def calibration(self) -> Calibrate | None:
        """The stage whose statistics are stored: for quantization, or with error propagation for widths alone."""
        if self.calibrate is None and self.widths is not None:
            return self.widths.calibration
        return self.calibrate

    def before_quantize(self) -> Iterator[Stage]:
        """The stages whose artifacts quantization reads."""
        yield from filter(None, (self.rotate, self.token_weights, self.calibration, self.spectra, self.widths))

    def quantizing(self) -> Iterator[QuantizeStage]:
        """The stages that make checkpoints."""
        yield from filter(None, (self.quantize, self.rtn))

    def evaluations(self, candidate: Candidate) -> Iterator[Stage]:
        """All that a candidate's model is loaded for."""
        if candidate.role == "original":
            yield from self.distributions
        # First those whose pass over the windows finds the losses too.
        yield from self.divergence.get(candidate.role, ())
        yield from self.perplexity[candidate.role]
        yield from (by_role[candidate.role] for by_role in (self.downstream, self.decode) if candidate.role in by_role)

    def paths(self, store: Store) -> dict[str, list[Path]]:
        """The folders of all artifacts, by stage, those of evaluations as "evaluate"; they need not exist yet."""
        paths: dict[str, list[Path]] = {}
        for stage in filter(None, (*self.before_quantize(), *self.quantizing(), self.finetune)):
            paths.setdefault(stage.name, []).append(store.path(stage.name, stage.key))
        measured = [stage for candidate in self.candidates for stage in self.evaluations(candidate)]
        return paths | {"evaluate": [store.path(stage.name, stage.key) for stage in measured]}
