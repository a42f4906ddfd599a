"""The sections of a configuration: one frozen pydantic class per TOML table, unknown keys refused.

Rules across sections are in lqer/config/rules.py.

A number format is defined once under [formats] and referred to by its name everywhere else. The reserved name "none"
stands for "not quantized", so that a command line can switch off what a preset switched on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lqer.config.cluster import ClusterConfig
from lqer.config.section import Positive, Section
from lqer.config.specs import FormatSpec, MethodSpec, RoundingSpec, TransformSpec
from lqer.data.datasets import DatasetSpec
from lqer.lowrank.solver import Solver
from lqer.methods import LqerAct
from lqer.methods.base import FactorAxis
from lqer.rounding import Nearest, Rounding
from lqer.store.offload import parse_bytes
from lqer.transforms import Quarot

NOT_QUANTIZED = "none"

Strength = Annotated[float, Field(ge=0, le=1)]
FormatName = str
TrainedPart = Literal["rht_signs", "low_rank", "norms", "scales", "floats"]
Loc = tuple[str | int, ...]


def _is_size(size: Any) -> Any:
    if size is not None:
        parse_bytes(size)
    return size


class CalibrationConfig(Section):
    """The text on which statistics of the inputs are gathered."""

    dataset: DatasetSpec = DatasetSpec(path="slimpajama-6b")
    num_samples: Positive = 32
    seq_len: Positive = 2048
    # Also the micro-batch of LQER's statistic, a maximum over batches of per-batch means: changing it changes the
    # result.
    batch_size: Positive = 2
    # Tokens kept per input site to report each layer's output error on.
    error_tokens: Positive = 256
    # What a token counts in E[x xᵀ] and E[x²] of linears that write to the residual stream: 1, or the inverse square of
    # the stream behind them.
    token_weights: Literal["none", "residual"] = "none"
    # Which tokens the experts of a mixture are calibrated on: those that the router sends to each, or all. Of its own
    # tokens one needs so many; what is missing are other tokens of its layer, spread over the text.
    experts: Literal["routed", "all"] = "routed"
    min_expert_tokens: Positive = 512
    # Whether statistics are of inputs as the quantized linears round them (quantize.activation).
    round_inputs: bool = False
    # Whether statistics of the original model are stored, so that other runs find them; else they are gathered while
    # blocks are quantized. "auto": where the run reads them twice, or they are small (lqer/resources/statistics.py).
    keep: Literal["auto"] | bool = "auto"
    # RAM for hidden states between blocks and accumulating statistics, here and in blockwise evaluation; the rest is
    # offloaded to files under output_dir. Bytes, or a size such as "4GB"; no limit by default.
    max_memory: Annotated[int | str | None, BeforeValidator(_is_size)] = None

    @property
    def max_bytes(self) -> int | None:
        return None if self.max_memory is None else parse_bytes(self.max_memory)


class LowRankConfig(Section):
    """The low-rank factors A and B: y = x·Wᵀ + x·A·B."""

    rank: Annotated[int, Field(ge=0)] = 0
    # Of A and B, unless B has its own.
    format: FormatName = NOT_QUANTIZED
    format_b: FormatName | None = None
    # The axis along which A and B are quantized in blocks: "reduction", the summed dimension of each product (A along
    # in_features, B along the rank); "lqer", as in the sweeps of LQER's paper (A along the rank, B along out_features);
    # "outer", never the rank (A along in_features, B along out_features).
    axis: FactorAxis = "reduction"
    # Instead of a rank: average bits per weight of the whole model, from which every linear is allocated a rank.
    budget_bits: Annotated[float, Field(gt=0, le=64)] | None = None
    # Under quantize.budget_bits: a linear gets its rank only where a wider weight would gain less per bit.
    optional: bool = False
    solver: Solver = "auto"
    # How often rounding and reconstruction alternate; by default as the method defines it.
    iterations: Positive | None = None


class LowRankOverride(Section):
    """Keys of [quantize.low_rank] that linears have of their own; absent: those of all."""

    rank: Annotated[int, Field(ge=0)] | None = None
    format: FormatName | None = None
    format_b: FormatName | None = None
    axis: FactorAxis | None = None


class OverrideConfig(Section):
    """Settings of the linears whose full name matches `match` (shell wildcards); the first match wins."""

    match: str
    weight: FormatName | None = None
    rounding: RoundingSpec | None = None
    activation: FormatName | None = None
    bias: FormatName | None = None
    asymmetric: Strength | None = None
    low_rank: LowRankOverride | None = None


class QuantizeConfig(Section):
    """What every linear of the decoder blocks becomes."""

    method: MethodSpec = LqerAct()
    weight: FormatName
    # Formats that a linear can get in place of `weight`, so that all linears together have `budget_bits` per weight.
    widths: tuple[FormatName, ...] = ()
    budget_bits: Annotated[float, Field(gt=0, le=64)] | None = None
    # Whether linears that share an input get the same one.
    tie_widths: bool = False
    # Which windows the losses of formats are measured on: the first ones of the calibration text, to which the errors
    # are fitted, or those behind it in its dataset, which they have not seen.
    widths_text: Literal["calibration", "unseen"] = "calibration"
    # By default the method's own, or nearest.
    rounding: RoundingSpec | None = None
    # Applied in this order: of the whole model, then of a block, then of one linear.
    transforms: tuple[TransformSpec, ...] = ()
    # Whether a block is quantized on the outputs of the quantized blocks before it instead of the original model's
    # activations; by default as the method defines it.
    propagate_error: bool | None = None
    # With error propagation: whether all linears of a block see inputs from its unrounded weights ("block"), or inputs
    # that the quantized linears before them compute.
    order: Literal["block", "sequential"] = "block"
    # How much of the error of the quantized model's inputs every linear makes up for.
    asymmetric: Strength = 0.0
    activation: FormatName = NOT_QUANTIZED
    bias: FormatName = NOT_QUANTIZED
    attention: FormatName = NOT_QUANTIZED
    attention_axis: Literal["reduction", "lqer"] = "reduction"
    low_rank: LowRankConfig = LowRankConfig()
    skip: tuple[str, ...] = ("lm_head",)
    override: tuple[OverrideConfig, ...] = ()

    @property
    def chosen_rounding(self) -> Rounding:
        """`rounding`, or else the method's."""
        return self.rounding or self.method.rounding or Nearest()

    def weights_under(self, override: OverrideConfig | None) -> tuple[FormatName, ...]:
        """The formats that weights can get after applying an override. One of its own exempts them from the choice."""
        own = None if override is None else override.weight
        return (own,) if own is not None else self.widths or (self.weight,)

    @property
    def roundings(self) -> dict[Loc, Rounding]:
        """Every rounding in use, by the key that names it."""
        found: dict[Loc, Rounding] = {("quantize", "rounding"): self.chosen_rounding}
        for i, override in enumerate(self.override):
            if override.rounding is not None:
                found["quantize", "override", i, "rounding"] = override.rounding
        return found

    def low_rank_under(self, override: OverrideConfig | None) -> LowRankConfig:
        """`low_rank` after applying an override. An explicit rank exempts the linears from the bit budget."""
        given = None if override is None else override.low_rank
        if given is None:
            return self.low_rank
        own = {key: value for key, value in given if value is not None}
        return self.low_rank.model_copy(update=own | ({} if given.rank is None else {"budget_bits": None}))

    @property
    def model_transform(self) -> Quarot | None:
        """The rotation of the whole model before anything else, if there is one."""
        return next((part for part in self.transforms if isinstance(part, Quarot)), None)

    @property
    def block_parts(self) -> list[str]:
        """The kinds of the components that need a whole block: its inputs, and the original outputs as targets."""
        transforms = [transform.kind for transform in self.transforms if transform.level == "block"]
        return transforms + [part.kind for part in (self.chosen_rounding,) if part.together]

    @property
    def paired_statistics(self) -> list[str]:
        """What compares the quantized model's inputs with the original model's: statistics by kind, "asymmetric"."""
        used = self.method.statistics.union(*(rounding.statistics for rounding in self.roundings.values()))
        kinds = sorted(statistic.kind for statistic in used if statistic.needs_original)
        return kinds + (["asymmetric"] if self.asymmetric or any(own.asymmetric for own in self.override) else [])

    @property
    def propagates_error(self) -> bool:
        """`propagate_error`, or else as block components, paired statistics, the order or the method require."""
        if self.propagate_error is not None:
            return self.propagate_error
        ordered = self.order == "sequential"
        return bool(self.block_parts or self.paired_statistics) or ordered or self.method.propagate_error


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


class TrainingConfig(Section):
    """Which parts of the quantized checkpoint are trained, and how; see lqer/training/parts.py."""

    parts: Annotated[tuple[TrainedPart, ...], Field(min_length=1)]
    # Of A (and rows of B), which are trained and stored in bfloat16; the others stay rounded.
    columns: Positive = 64
    num_samples: Positive = 192
    # Held-out windows after those: the epoch with the lowest loss on them is stored.
    validation_samples: Positive = 64
    seq_len: Positive = 512
    batch_size: Positive = 2
    epochs: Positive = 5
    # "original": cross-entropy with the original's distribution; "text": with the next token.
    loss: Literal["original", "text"] = "original"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    low_rank_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    # Relative to the root mean square of a vector or factor, and to each scale.
    norm_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    scale_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    factor_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    # Fraction of the steps in which the learning rate rises; from there it falls to 0.
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02


class FinetuneConfig(TrainingConfig):
    """The training, and the text it uses."""

    dataset: DatasetSpec = DatasetSpec(path="slimpajama-6b")

    @property
    def training(self) -> TrainingConfig:
        """All but the text."""
        return TrainingConfig(**self.model_dump(exclude={"dataset"}))


class ExportConfig(Section):
    """What the finished checkpoint is written as for other programs, in the folder `export` of the run's.

    A target is a kind or a table of its kind and settings; lqer/export/planned.py reads them.
    """

    targets: Annotated[tuple[str | dict[str, Any], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _folders_differ(self) -> ExportConfig:
        kinds = [target if isinstance(target, str) else target.get("kind") for target in self.targets]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise ValueError(f'targets must name each kind once; found "{twice}" twice (`lqer export` writes a second)')
        return self


class PublishedConfig(Section):
    """What a paper reports of this experiment, by model: report.md says whether a run meets it."""

    # Where the figures stand.
    source: Annotated[str, Field(min_length=1)]
    # A run meets a figure that it is worse than by at most this share of it.
    tolerance: Annotated[float, Field(gt=0, lt=1)]
    # The text of the perplexities, by its label.
    text: str = "wikitext2"
    # By the model's name, without its owner or folder: the figures of models of one recipe stand together.
    perplexity: dict[str, Annotated[float, Field(gt=1)]] = Field(default_factory=dict)
    # The mean over evaluation.downstream.tasks, between 0 and 1.
    accuracy: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=dict)


class TrackingConfig(Section):
    """Where the numbers of a run are sent to as well."""

    backend: Literal["wandb", "trackio"]
    project: str = "lqer"


class Config(Section):
    """One experiment. Keys are explained in docs/configuration.md."""

    model: str
    revision: str | None = None
    output_dir: str = "checkpoints"
    tag: str
    # Of 64 bits, as torch takes them.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # "auto" dispatches the model over all GPUs for fine-tuning and evaluation; calibration and quantization use one.
    device_map: Literal["single", "auto"] = "single"
    formats: dict[str, FormatSpec] = Field(default_factory=dict)
    calibration: CalibrationConfig = CalibrationConfig()
    quantize: QuantizeConfig
    # After quantization and before evaluation; absent: nothing is trained.
    finetune: FinetuneConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    # After the evaluation; absent: nothing is exported.
    export: ExportConfig | None = None
    published: PublishedConfig | None = None
    tracking: TrackingConfig | None = None
    # Absent: everything is done by this process.
    cluster: ClusterConfig | None = None

    @property
    def ray(self) -> ClusterConfig | None:
        """The cluster whose workers do the jobs, if there is one."""
        return None if self.cluster is None or self.cluster.address == "off" else self.cluster

    @property
    def has_gang(self) -> bool:
        """Whether several processes of a machine make a stage."""
        return self.cluster is not None and self.cluster.gang != 1

    @property
    def alone(self) -> Config:
        """The same experiment without Ray: this process does it, and the gang that it starts."""
        gang = 1 if self.cluster is None else self.cluster.gang
        return self.model_copy(update={"cluster": None if gang == 1 else ClusterConfig(gang=gang)})

    @property
    def experiment(self) -> Config:
        """The same, whoever does it."""
        return self.model_copy(update={"cluster": None})
