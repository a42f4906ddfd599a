"""The sections of a configuration: one frozen pydantic class per TOML table, unknown keys refused.

Rules across sections are in lqer/config/rules.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lqer.config.cluster import ClusterConfig
from lqer.config.evaluation import EvaluationConfig
from lqer.config.quantize import QuantizeConfig
from lqer.config.section import Positive, Section
from lqer.config.specs import FormatSpec
from lqer.data.datasets import DatasetSpec
from lqer.store.offload import parse_bytes

TrainedPart = Literal["rht_signs", "low_rank", "norms", "scales", "floats"]


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
    # What a token counts in E[x xᵀ] and E[x²]: 1; for linears that write to the residual stream, the inverse square of
    # the stream behind them; for all, the mean square of the loss's gradient with respect to their outputs.
    token_weights: Literal["none", "residual", "gradient"] = "none"
    # Which tokens the experts of a mixture are calibrated on: those that the router sends to each, or all. Of its own
    # tokens each needs min_expert_tokens; others of its layer, spread over the text, make up for those that it lacks.
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


class TrainingConfig(Section):
    """Which parts of the quantized checkpoint are trained, and how; see lqer/training/parts.py."""

    parts: Annotated[tuple[TrainedPart, ...], Field(min_length=1)]
    # Columns of A (and rows of B) that are trained and stored in bfloat16; the others stay rounded.
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
    # Keys are names of models, without owner or folder: the figures of all models of one recipe stand together.
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
    # torch takes seeds of 64 bits.
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
