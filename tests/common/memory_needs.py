"""A small run and the memory and disk that are estimated for it, by stage and by need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from lqer.config.plan import plan_model
from lqer.config.schema import Config
from lqer.models.source import ModelSource
from lqer.models.summary import ModelSummary, summarize_model
from lqer.resources.memory import estimate
from lqer.resources.workload import Need, StageMemory, Workload

WINDOWS, SEQ_LEN = 5, 12


def experiment(**sections) -> Config:
    text = {"seq_len": SEQ_LEN, "batch_size": 2}
    sections = {name: dict(value) for name, value in sections.items()}
    evaluation = {"perplexity": {"max_windows": WINDOWS, **text}, "baselines": [], **sections.pop("evaluation", {})}
    return Config(
        model="model",
        tag="tag",
        formats={
            "w4": {"kind": "mxint", "bits": 4}, "x8": {"kind": "mxint", "bits": 8}, **sections.pop("formats", {}),
        },
        calibration={"num_samples": WINDOWS, "error_tokens": 24, **text, **sections.pop("calibration", {})},
        quantize={
            "method": "qera-exact", "weight": "w4", "low_rank": {"rank": 8, "format": "x8"},
            **sections.pop("quantize", {}),
        },
        finetune=sections.pop("finetune", None),
        evaluation=evaluation,
    )  # fmt: skip


def outline_of(model: PreTrainedModel, folder: Path) -> ModelSummary:
    model.config.save_pretrained(folder)
    return summarize_model(ModelSource("model", str(folder), None, "", ""))


def workload(model: PreTrainedModel, folder: Path, config: Config | None = None, **changes) -> Workload:
    config, summary = config or experiment(), outline_of(model, folder)
    work = Workload(config, summary, plan_model(config, summary), stored=4, computed=4, on_gpu=False, streams=True)
    return replace(work, **changes)


def stages_of(work: Workload) -> dict[str, StageMemory]:
    return {stage.name: stage for stage in estimate(work)}


def need(needs: tuple[Need, ...], what: str) -> int:
    (found,) = (need.bytes for need in needs if need.what == what)
    return found
