"""The section [evaluation]: what is measured, on which texts and tasks, of which models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lqer.config.section import Positive, Section
from lqer.data.datasets import DatasetSpec


class PerplexityConfig(Section):
    """The texts that perplexity is measured on, and how they are cut into windows (lqer/evaluation/perplexity.py)."""

    datasets: tuple[DatasetSpec, ...] = Field(default=(DatasetSpec(path="wikitext2"),), min_length=1)
    protocol: Literal["concat", "row-batches", "lm-eval"] = "concat"
    seq_len: Positive = 2048
    batch_size: Positive = 1
    # Only the first windows of each dataset, for a quick look; the token count in the results says so.
    max_windows: Positive | None = None

    @model_validator(mode="after")
    def _windows_exist(self) -> PerplexityConfig:
        if self.protocol == "lm-eval" and self.max_windows is not None:
            raise ValueError('max_windows cuts token windows; protocol "lm-eval" scores whole documents (use rows)')
        return self


class DivergenceConfig(Section):
    """The divergence of every candidate from the original, on the windows of every perplexity text."""

    # Tokens whose probabilities are told apart after each token: the original's most likely ones. All others count as
    # one, which makes the result a lower bound.
    top_k: Positive = 256


def _section_or_switch(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


class DownstreamConfig(Section):
    """Tasks of lm-evaluation-harness, by their names there or in a folder of one's own."""

    tasks: tuple[str, ...]
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Positive | None = None
    batch_size: Positive = 8
    max_length: Positive = 2048
    # A folder of task YAMLs in addition to lm-eval's own, and the folder of their data files.
    include_path: str | None = None
    data_dir: str | None = None
    # Whether tasks of include_path may run Python code of that folder.
    trust_code: bool = False

    @property
    def task_folder(self) -> Path | None:
        return None if self.include_path is None else Path(self.include_path)

    @property
    def data_folder(self) -> Path | None:
        return None if self.data_dir is None else Path(self.data_dir)


class EvaluationConfig(Section):
    """What is measured, of which models, and by what they are run."""

    # "emulate": ordinary arithmetic; "triton": kernels on packed weights; "auto": kernels where they can run.
    backend: Literal["auto", "emulate", "triton"] = "auto"
    # Evaluated in addition to the quantized model: the original, and "rtn", the same formats without low-rank factors.
    baselines: tuple[Literal["original", "rtn"], ...] = ("original",)
    # One decoder block in memory at a time, over all windows: for models larger than memory. The numbers are the same.
    blockwise: bool = False
    perplexity: PerplexityConfig | None = None
    # `true` is the section with its defaults, `false` none.
    divergence: Annotated[DivergenceConfig | None, BeforeValidator(_section_or_switch)] = None
    downstream: DownstreamConfig | None = None
    # Tokens a second of the original and, on kernels, of the quantized model; nothing without a GPU.
    decode_speed: bool = False
