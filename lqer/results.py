"""The contract of results.json: every key with its meaning and unit.

A number that does not apply is null or its row is missing; it is never a string or zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from lqer.checkpoint.bits import Bits
from lqer.errors import DataError

SCHEMA_VERSION = 1
# The file of this contract, within the folder of a run.
RESULTS_FILE = "results.json"


class Versions(TypedDict):
    python: str
    torch: str
    transformers: str
    triton: str | None  # null if not installed
    lm_eval: str
    lqer: str
    git: str | None  # commit of lqer's own checkout, with "-dirty" if it has local changes; null outside a checkout


class ModelInfo(TypedDict):
    name: str  # as in the configuration
    revision: str | None  # commit on the hub; null for local files
    fingerprint: str  # a hash of the local files, or of name and commit
    architecture: str  # transformers class
    parameters: int  # of the original model, tied ones counted once
    quantized_parameters: int  # weights of the quantized linears
    description: str


class FinetuneInfo(TypedDict):
    """What was trained after quantization, and the loss on held-out windows."""

    parts: list[str]
    tokens: int  # of the training windows, without the held-out ones
    validation_loss: list[float]  # nats per token: before training, then after every epoch
    original_loss: float  # of the original model on the same windows: what is above it is divergence
    best_epoch: int  # the epoch whose state is evaluated; 0: before training


class Baseline(TypedDict):
    """The same formats and rounding without low-rank factors, if evaluation.baselines asks for it."""

    bits: Bits


class AllocationInfo(TypedDict):
    """The ranks of quantize.low_rank.budget_bits against one uniform rank; layers.csv lists the ranks."""

    objective: float  # sum over linears of the relative output error under the metric, before A and B are rounded
    uniform_rank: int  # the largest that fits the budget
    uniform_bits: float  # average bits at that rank
    uniform_objective: float


class WidthsInfo(TypedDict):
    """The formats that quantize.budget_bits led to, against one format for all; layers.csv lists the bits."""

    # How many got which of quantize.widths; under quantize.low_rank.optional also "NAME with A and B".
    linears: dict[str, int]
    average_bits: float
    objective: float  # estimated divergence from the original, nats per token
    uniform: str | None  # the best single format within the budget; null: none fits, the narrowest is compared
    uniform_bits: float  # average bits of that format
    uniform_objective: float


class ExpertsInfo(TypedDict):
    """The experts that a router sends tokens to; what is active are means over the tokens of the calibration text."""

    count: int  # of all layers
    active_weights: float  # weights of the quantized linears that a token is multiplied by
    active_bits: float  # bits stored for those weights, everything counted as in `bits`
    active_average: float  # their quotient: bits per active weight
    fewest_tokens: int  # calibration tokens that the router sent to the expert that got fewest
    # Experts that got fewer than calibration.min_expert_tokens, and so tokens that the router sent to others.
    topped_up: list[str]
    unseen: list[str]  # experts that got none


class CalibrationInfo(TypedDict):
    dataset: str  # label
    source: str  # repository, revision, split and rows; or file
    tokens: int
    fingerprint: str  # sha256 of the token ids


class Divergence(TypedDict):
    """From the original's next-token distribution, over the tokens of the row; null where it is not finite."""

    kl_mean: float | None  # KL(original || candidate), nats per token: a lower bound, see DivergenceInfo
    kl_p99: float | None  # 99 of 100 tokens have at most that
    top1_agreement: float | None  # share of tokens after which both models' most likely token is the same


class DivergenceInfo(TypedDict):
    """How far the candidates are from the original on the windows of a perplexity.

    The top_k most likely tokens of the original are told apart after each token; all others count as one.
    """

    top_k: int
    covered: float  # mean probability of the top_k tokens under the original
    rtn: Divergence | None  # null if not in evaluation.baselines
    quantized: Divergence


class PerplexityRow(TypedDict):
    dataset: str
    source: str
    protocol: str  # concat | row-batches | lm-eval
    seq_len: int  # tokens per window
    tokens: int  # predicted tokens that the mean is taken over
    fingerprint: str  # a hash of the tokens or documents: what tells two texts with one name apart
    original: float | None  # null if not in evaluation.baselines; the same for the next key
    rtn: float | None  # null also if it is not finite, which `warnings` says; the same for the next key
    quantized: float | None
    divergence: DivergenceInfo | None  # null unless evaluation.divergence asks for it


class DownstreamRow(TypedDict):
    task: str
    metric: str
    original: float | None
    rtn: float | None
    quantized: float
    stderr: float | None  # of `quantized`
    num_fewshot: int
    samples: int


class ExportRow(TypedDict):
    """What an entry of export.targets led to: files that were read back and compared, unverified ones, or none."""

    target: str  # kind
    settings: dict[str, Any]
    folder: str | None  # within the run's; null if refused
    refused: str | None  # why there are no files
    not_verified: str | None  # why the files were not compared with the checkpoint; null if they were, or if refused
    weight_bytes: int | None  # of the files of weights
    closeness: str | None  # what is expected of them: exact | reordered | rounded | other inputs
    logit_difference: float | None  # the largest; the numbers from here are null unless compared
    largest_logit: float | None
    perplexity: float | None  # of the checkpoint without what the target cannot carry, on the windows of the comparison
    exported_perplexity: float | None  # the same of the files


class Decode(TypedDict):
    """Tokens a second at batch 1, without a cache: the cost of the weights; null where it was not measured."""

    original: float | None
    quantized: float | None  # on kernels only


class Layers(TypedDict):
    file: str
    count: int  # quantized linears


class Seconds(TypedDict):
    """Seconds spent on each artifact, in whichever run made it; total is the wall clock of this run.

    calibrate includes the weights of tokens by gradients; quantize the error spectra for rank allocation, the losses
    for widths and, with error propagation or where statistics are not kept (calibration.keep), the gathering of
    statistics.
    """

    calibrate: float
    quantize: float
    finetune: float
    evaluate: float
    total: float


class Results(TypedDict):
    schema_version: int
    tag: str
    warnings: list[str]  # what a reader of the numbers must know first
    config: dict[str, Any]  # resolved
    versions: Versions
    model: ModelInfo
    bits: Bits
    checkpoint_bytes: int  # of the checkpoint's tensors, unquantized parameters included
    allocation: AllocationInfo | None  # null if ranks are given
    widths: WidthsInfo | None  # null if formats are given
    baseline: Baseline | None
    experts: ExpertsInfo | None  # null for a model whose router chooses no experts
    finetune: FinetuneInfo | None  # null if nothing was trained
    calibration: CalibrationInfo
    perplexity: list[PerplexityRow]
    downstream: list[DownstreamRow]
    exports: list[ExportRow]  # in the order of export.targets
    tokens_per_second: Decode
    layers: Layers
    seconds: Seconds
    peak_memory_bytes: int  # of this process: resident on a CPU, allocated on the GPU if there is one
    device: str  # processor or GPU by name


def read_results(path: Path) -> Results:
    """The results in a file. Raises DataError for those of another version of this contract."""
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    if (version := results.get("schema_version")) != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version {version} is not {SCHEMA_VERSION}; run it again")
    return results
