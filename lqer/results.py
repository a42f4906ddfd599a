"""The contract of results.json: every key of it, with what it means and in which unit.

Numbers that do not apply are left out of their table or null; they are never strings or zeros.
"""

from __future__ import annotations

from typing import Any, TypedDict

from lqer.checkpoint.bits import Bits

SCHEMA_VERSION = 1


class Versions(TypedDict):
    python: str
    torch: str
    transformers: str
    triton: str | None  # null where it is not installed
    lm_eval: str
    lqer: str
    git: str | None  # commit of lqer's own checkout, with "-dirty" where it was changed; null outside one


class ModelInfo(TypedDict):
    name: str  # as in the configuration
    revision: str | None  # commit on the hub; null for local files
    fingerprint: str  # sha256 over the local files, or over name and commit
    architecture: str  # transformers class
    parameters: int  # of the original model, tied ones once
    quantized_parameters: int  # weights of the quantized linears
    description: str


class FinetuneInfo(TypedDict):
    """What was trained after quantization, and how the loss on held-out windows went."""

    parts: list[str]
    tokens: int  # of the windows trained on, held-out ones not counted
    validation_loss: list[float]  # nats per token: before, then after every epoch
    best_epoch: int  # whose state is evaluated; 0: that of before


class Baseline(TypedDict):
    """Plain rounding in the same formats, where evaluation.baselines asks for it."""

    bits: Bits


class AllocationInfo(TypedDict):
    """How ranks under quantize.low_rank.budget_bits compare with one rank for all; the ranks stand in layers.csv."""

    objective: float  # sum over linears of the relative output error under the method's metric, A and B not rounded
    uniform_rank: int  # the largest that fits the budget
    uniform_bits: float  # average bits at that rank
    uniform_objective: float


class CalibrationInfo(TypedDict):
    dataset: str  # label
    source: str  # repository, revision, split and rows, or file
    tokens: int
    fingerprint: str  # sha256 of the token ids


class PerplexityRow(TypedDict):
    dataset: str
    source: str
    protocol: str  # gptq | lqer | lm-eval
    seq_len: int  # tokens of a window
    tokens: int  # predicted tokens the mean runs over
    original: float | None  # null where evaluation.baselines leaves it out; so too plain
    plain: float | None
    quantized: float


class DownstreamRow(TypedDict):
    task: str
    metric: str
    original: float | None
    plain: float | None
    quantized: float
    stderr: float | None  # of the quantized model's value
    num_fewshot: int
    samples: int


class Layers(TypedDict):
    file: str
    count: int  # quantized linears


class Seconds(TypedDict):
    """Seconds spent making the artifacts, in whichever run they were made; total is the wall clock of this run.

    quantize includes the error spectra that a budget of bits is shared out by, and in the quantized stream the
    gathering of statistics, for which calibrate is 0.
    """

    calibrate: float
    quantize: float
    finetune: float
    evaluate: float
    total: float


class Results(TypedDict):
    schema_version: int
    tag: str
    config: dict[str, Any]  # resolved
    versions: Versions
    model: ModelInfo
    bits: Bits
    allocation: AllocationInfo | None  # null where ranks are given
    baseline: Baseline | None
    finetune: FinetuneInfo | None  # null where nothing was trained
    calibration: CalibrationInfo
    perplexity: list[PerplexityRow]
    downstream: list[DownstreamRow]
    layers: Layers
    seconds: Seconds
    peak_memory_bytes: int  # of this process: resident on a CPU, allocated on the GPU where there is one
    device: str  # processor or GPU by name
