"""The context of a run: the configuration, with the model, the plans and the device resolved before any work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lqer.checkpoint.backend import Backend, resolve_backend
from lqer.config import Config
from lqer.config.plan import plan_model, plan_widths
from lqer.errors import ModelError
from lqer.evaluation.downstream import check_tasks
from lqer.formats import NumberFormat
from lqer.methods import LinearPlan, Plans
from lqer.models.probe import check_walk
from lqer.models.source import ModelSource, check_weights, pick_device, pick_dtype, resolve_model
from lqer.models.summary import ModelSummary, summarize_model
from lqer.resources.statistics import keeps_statistics
from lqer.run.folder import store_path
from lqer.stages.allocate_ranks import check_ranks
from lqer.stages.allocate_widths import check_widths, options_of
from lqer.stages.evaluate import task_files
from lqer.store.fingerprints import FINGERPRINTS, Fingerprints
from lqer.store.offload import Offload

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """One run; `plans` holds None for a linear that is skipped, `choices` the formats of weights that have several.

    config: without what does not belong to the experiment. ranks: how many processes work on a block together.
    """

    config: Config
    source: ModelSource
    summary: ModelSummary
    plans: dict[str, LinearPlan | None]
    choices: dict[str, tuple[NumberFormat, ...]]
    device: torch.device
    dtype: torch.dtype
    backend: Backend
    fingerprints: Fingerprints
    ranks: int = 1

    @property
    def store_path(self) -> Path:
        return store_path(self.config)

    @property
    def keeps_statistics(self) -> bool:
        """Whether statistics of the original model are stored."""
        return keeps_statistics(self.config, self.summary, self.plans, self.dtype.itemsize)

    def offload(self) -> Offload:
        """Memory for hidden states and statistics, up to calibration.max_memory; beyond it, files in the store."""
        return Offload(self.config.calibration.max_bytes, self.store_path)


def _kept(unreached: Sequence[str], plans: Plans) -> dict[str, None]:
    """Plans that leave out the linears that no text reaches. Raises ModelError if nothing else would be quantized."""
    left_out = [name for name in unreached if plans[name] is not None]
    if not any(plan is not None for name, plan in plans.items() if name not in left_out):
        raise ModelError(f"model: text reaches neither {left_out[0]} nor any other linear to be quantized")
    if left_out:
        log.warning("%d linears stay unquantized, as no text reaches them, such as %s", len(left_out), left_out[0])
    return dict.fromkeys(left_out)


def _ranks(config: Config, device: torch.device) -> int:
    gang = 1 if config.cluster is None else config.cluster.gang
    if gang != "node":
        return gang
    return torch.cuda.device_count() if device.type == "cuda" else 1


def prepare(config: Config) -> RunContext:
    """Resolve and check everything that can be checked before any work. Raises LqerError."""
    device = pick_device(config.device)
    ranks, config = _ranks(config, device), config.experiment
    fingerprints = Fingerprints(store_path(config) / FINGERPRINTS)
    source = resolve_model(config.model, config.revision, fingerprints)
    summary = summarize_model(source)
    check_weights(source)
    quantize = config.quantize
    gradients = config.calibration.token_weights == "gradient" or quantize.budget_bits is not None
    unreached = check_walk(source, bool(quantize.block_parts), gradients)
    plans = plan_model(config, summary)
    plans |= _kept(unreached, plans)
    if (budget_bits := config.quantize.low_rank.budget_bits) is not None:
        check_ranks(plans, summary.linears, budget_bits)
    choices = plan_widths(config, plans)
    if config.quantize.budget_bits is not None:
        options = options_of(plans, choices, config.quantize.low_rank.optional)
        check_widths(plans, options, summary.linears, config.quantize.budget_bits)
    if config.evaluation.downstream is not None:
        downstream = config.evaluation.downstream
        check_tasks(task_files(downstream), downstream.num_fewshot)
    dtype = pick_dtype(config.dtype, source, device)
    formats = {name: (plan.weight, plan.activation) for name, plan in plans.items() if plan is not None}
    for name, plan in plans.items():
        if plan is not None and name in choices:
            formats |= {f"{name} ({one.kind}, {i})": (one, plan.activation) for i, one in enumerate(choices[name])}
    wanted = config.evaluation.backend
    if wanted == "auto" and config.finetune is not None and "low_rank" in config.finetune.parts:
        wanted = "emulate"  # kernels do not support fine-tuned columns of A and B
    backend = resolve_backend(wanted, device, dtype, formats)
    return RunContext(config, source, summary, plans, choices, device, dtype, backend, fingerprints, ranks)
