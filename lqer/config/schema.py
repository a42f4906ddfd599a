"""What a configuration may say: one frozen pydantic class per TOML table, unknown keys refused.

A number format is defined once under [formats] and referred to by its name everywhere else. The reserved name "none"
stands for "not quantized", so that a command line can switch off what a preset switched on.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    model_validator,
)

from lqer.components import Component, component_class
from lqer.data.datasets import DatasetSpec
from lqer.formats import NumberFormat, unsupported_cut
from lqer.lowrank.solver import Solver
from lqer.methods import LqerAct, Method
from lqer.methods.base import FACTOR_AXES, FactorAxis
from lqer.rounding import ROUNDINGS, Nearest, Rounding
from lqer.store.offload import parse_bytes
from lqer.transforms import Scheme, Transform, unsupported_order

NOT_QUANTIZED = "none"

Positive = Annotated[int, Field(gt=0)]
FormatName = str
Loc = tuple[str | int, ...]


def _reader(family: type[Component]) -> PlainValidator:
    """Reads a component that is named by its kind, or by a table of its kind and settings."""

    def read(value: Any) -> Component:
        if isinstance(value, Component):
            return value
        if not isinstance(value, str | dict):
            raise ValueError(f"must be the kind of a {family.family} or a table with its kind")
        settings = {"kind": value} if isinstance(value, str) else dict(value)
        cls = component_class(family, settings.pop("kind", None))
        # As in the whole configuration: strict about types, while lists become tuples.
        return TypeAdapter(cls).validate_json(json.dumps(settings), strict=True)

    return PlainValidator(read)


_WRITER = PlainSerializer(lambda part: {key: value for key, value in part.to_dict().items() if value is not None})
FormatSpec = Annotated[NumberFormat, _reader(NumberFormat), _WRITER]
RoundingSpec = Annotated[Rounding, _reader(Rounding), _WRITER]
MethodSpec = Annotated[Method, _reader(Method), _WRITER]
TransformSpec = Annotated[Transform, _reader(Transform), _WRITER]


def _is_size(size: Any) -> Any:
    if size is not None:
        parse_bytes(size)
    return size


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationConfig(Section):
    """Which text the input statistics are gathered on."""

    dataset: DatasetSpec = DatasetSpec(path="slimpajama-6b")
    num_samples: Positive = 32
    seq_len: Positive = 2048
    # Also the micro-batch of LQER's statistic, a maximum over batches of per-batch means: changing it changes the
    # result.
    batch_size: Positive = 2
    # Tokens kept per input site to report each layer's output error on.
    error_tokens: Positive = 256
    # RAM for hidden states between blocks and statistics in the making, here and in blockwise evaluation; what exceeds
    # it lies in files under output_dir. Bytes, or a size such as "4GB"; no limit by default.
    max_memory: Annotated[int | str | None, BeforeValidator(_is_size)] = None

    @property
    def max_bytes(self) -> int | None:
        return None if self.max_memory is None else parse_bytes(self.max_memory)


class LowRankConfig(Section):
    """The branch x·A·B beside a quantized weight."""

    rank: Annotated[int, Field(ge=0)] = 0
    # Of A and B, unless B has one of its own.
    format: FormatName = NOT_QUANTIZED
    format_b: FormatName | None = None
    # The axis along which A and B are quantized in blocks: "reduction", the summed dimension of each product (A along
    # in_features, B along the rank); "lqer", as in the sweeps of LQER's paper (A along the rank, B along out_features);
    # "outer", never the rank (A along in_features, B along out_features).
    axis: FactorAxis = "reduction"
    # Instead of a rank: average bits of the whole model, from which every linear gets the rank that it needs.
    budget_bits: Annotated[float, Field(gt=0)] | None = None
    solver: Solver = "auto"
    # How often rounding and reconstruction are alternated; by default as the method defines it.
    iterations: Positive | None = None


class LowRankOverride(Section):
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
    low_rank: LowRankOverride | None = None


class QuantizeConfig(Section):
    """What every linear of the decoder blocks becomes."""

    method: MethodSpec = LqerAct()
    weight: FormatName
    # By default the method's own, or nearest.
    rounding: RoundingSpec | None = None
    # Applied in this order: of the whole model, then of a block, then of one linear.
    transforms: tuple[TransformSpec, ...] = ()
    # Whether a block is quantized on the outputs of the quantized blocks before it instead of the original model's
    # activations; by default as the method defines it.
    propagate_error: bool | None = None
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

    @property
    def roundings(self) -> dict[Loc, Rounding]:
        """Every rounding that some linear has, by the key that names it."""
        found: dict[Loc, Rounding] = {("quantize", "rounding"): self.chosen_rounding}
        for i, override in enumerate(self.override):
            if override.rounding is not None:
                found["quantize", "override", i, "rounding"] = override.rounding
        return found

    def low_rank_under(self, override: OverrideConfig | None) -> LowRankConfig:
        """`low_rank` as the linears of an override have it: a rank of their own is not for a budget to choose."""
        given = None if override is None else override.low_rank
        if given is None:
            return self.low_rank
        own = {key: value for key, value in given if value is not None}
        return self.low_rank.model_copy(update=own | ({} if given.rank is None else {"budget_bits": None}))

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated as a whole before anything else."""
        return any(transform.level == "model" for transform in self.transforms)

    @property
    def block_parts(self) -> list[str]:
        """The parts, by kind, that need a whole block, its inputs and what its outputs should be."""
        transforms = [transform.kind for transform in self.transforms if transform.level == "block"]
        return transforms + [part.kind for part in (self.chosen_rounding,) if part.together]

    @property
    def propagates_error(self) -> bool:
        """`propagate_error`, or else as block components or the method require."""
        if self.propagate_error is not None:
            return self.propagate_error
        return bool(self.block_parts) or self.method.propagate_error


class PerplexityConfig(Section):
    datasets: tuple[DatasetSpec, ...] = (DatasetSpec(path="wikitext2"),)
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


class DownstreamConfig(Section):
    tasks: tuple[str, ...]
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Positive | None = None
    batch_size: Positive = 8
    max_length: Positive = 2048
    # A folder of task YAMLs beside lm-eval's own, and the folder their relative data files are read from.
    include_path: str | None = None
    data_dir: str | None = None


class EvaluationConfig(Section):
    # "emulate": ordinary arithmetic; "triton": kernels on packed weights; "auto": kernels where they can run.
    backend: Literal["auto", "emulate", "triton"] = "auto"
    # Evaluated in addition to the quantized model: the original, and "rtn", the same formats without low-rank factors.
    baselines: tuple[Literal["original", "rtn"], ...] = ("original",)
    # One decoder block in memory at a time, over all windows: for models larger than memory. The numbers are the same.
    blockwise: bool = False
    perplexity: PerplexityConfig | None = None
    downstream: DownstreamConfig | None = None


class TrainingConfig(Section):
    """Which parts of the quantized checkpoint are trained, and how; see lqer/stages/finetune.py."""

    parts: Annotated[tuple[Literal["rht_signs", "low_rank"], ...], Field(min_length=1)]
    # Of A (and rows of B), which are kept in bfloat16; the others stay as they were rounded.
    columns: Positive = 64
    num_samples: Positive = 192
    # Windows after those, held out: the best state on them is kept.
    validation_samples: Positive = 64
    seq_len: Positive = 512
    batch_size: Positive = 2
    epochs: Positive = 5
    # "original": cross-entropy with the original's distribution; "text": with the next token.
    loss: Literal["original", "text"] = "original"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    low_rank_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    # Chunk of all steps in which the rate rises to its full value, from which it falls to 0.
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02


class FinetuneConfig(TrainingConfig):
    """The training, and the text it uses."""

    dataset: DatasetSpec = DatasetSpec(path="slimpajama-6b")

    @property
    def training(self) -> TrainingConfig:
        """All but the text."""
        return TrainingConfig(**self.model_dump(exclude={"dataset"}))


class TrackingConfig(Section):
    backend: Literal["wandb", "trackio"]
    project: str = "lqer"


class Config(Section):
    """One experiment. Keys are explained in docs/configuration.md."""

    model: str
    revision: str | None = None
    output_dir: str = "checkpoints"
    tag: str
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # "auto" spreads a model over all GPUs for its fine-tuning and evaluation; calibration and quantization use one.
    device_map: Literal["single", "auto"] = "single"
    formats: dict[str, FormatSpec] = {}
    calibration: CalibrationConfig = CalibrationConfig()
    quantize: QuantizeConfig
    # After quantization and before evaluation; absent: nothing is trained.
    finetune: FinetuneConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig | None = None

    @model_validator(mode="after")
    def _is_one_experiment(self) -> Config:
        quantize = self.quantize
        if not self.tag or "/" in self.tag or self.tag.startswith("."):
            raise KeyedError(("tag",), "must be a plain folder name", found=self.tag)
        if NOT_QUANTIZED in self.formats:
            raise KeyedError(("formats", NOT_QUANTIZED), 'the name "none" is reserved for "not quantized"')
        self._check_blockwise()
        self._check_format(("quantize", "weight"), quantize.weight, optional=False)
        for key in ("activation", "bias", "attention"):
            self._check_format(("quantize", key), getattr(quantize, key))
        for key in ("format", "format_b"):
            if (name := getattr(quantize.low_rank, key)) is not None:
                self._check_format(("quantize", "low_rank", key), name)
        for i, override in enumerate(quantize.override):
            for key in ("weight", "activation", "bias"):
                if (name := getattr(override, key)) is not None:
                    self._check_format(("quantize", "override", i, key), name, optional=key != "weight")
            for key in ("format", "format_b"):
                if override.low_rank and (name := getattr(override.low_rank, key)) is not None:
                    self._check_format(("quantize", "override", i, "low_rank", key), name)
        self._check_roundings()
        self._check_low_rank()
        self._check_transforms()
        self._check_block_parts()
        self._check_finetune()
        return self

    def _check_roundings(self) -> None:
        """The method's rounding is its own, and every weight's format is one that its rounding can round to."""
        quantize = self.quantize
        own, named = quantize.method.rounding, quantize.rounding
        if own is not None and named is not None and named.kind != own.kind:
            rule = f'method "{quantize.method.kind}" always uses rounding "{own.kind}"; only its options may be set'
            raise KeyedError(("quantize", "rounding"), rule, named.kind)
        pairs: list[tuple[Loc, Rounding, FormatName]] = [
            (("quantize", "rounding"), quantize.chosen_rounding, quantize.weight)
        ]
        for i, override in enumerate(quantize.override):
            rounding, weight = override.rounding or quantize.chosen_rounding, override.weight or quantize.weight
            key = "weight" if override.rounding is None else "rounding"
            pairs.append((("quantize", "override", i, key), rounding, weight))
        for loc, rounding, weight in pairs:
            if (unsupported_reason := quantize.method.unsupported_reason(rounding)) is not None:
                raise KeyedError(loc, unsupported_reason, rounding.kind)
            if (unsupported_reason := rounding.unsupported_reason(self.formats[weight])) is not None:
                raise KeyedError(loc, f'{unsupported_reason} (weights are "{weight}")', rounding.kind)

    def _check_low_rank(self) -> None:
        """The method can do what [quantize.low_rank] asks of it."""
        quantize, low_rank = self.quantize, self.quantize.low_rank
        method, table = quantize.method, ("quantize", "low_rank")
        ranks: dict[Loc, int | None] = {(*table, "rank"): low_rank.rank}
        for i, override in enumerate(quantize.override):
            if override.low_rank:
                ranks["quantize", "override", i, "low_rank", "rank"] = override.low_rank.rank
        if not method.reconstructs:
            nothing = f'method "{method.kind}" reconstructs nothing'
            for loc, rank in ranks.items():
                if rank:
                    raise KeyedError(loc, f"must be 0: {nothing}", rank)
            for key in ("budget_bits", "iterations"):
                if getattr(low_rank, key) is not None:
                    raise KeyedError((*table, key), f"must be left out: {nothing}", getattr(low_rank, key))
        if low_rank.budget_bits is None:
            return
        iterations = low_rank.iterations or method.iterations
        if quantize.propagates_error:
            rule = "not supported with propagate_error = true: ranks are allocated from errors on the original model's "
            rule += "activations, before any block is quantized"
            raise KeyedError((*table, "budget_bits"), rule, low_rank.budget_bits)
        if low_rank.rank:
            raise KeyedError((*table, "rank"), "must be 0 beside budget_bits, which chooses every rank", low_rank.rank)
        if not method.rounds_first:
            rule = f'must be left out: ranks are shared out by the errors of rounding, "{method.kind}" rounds last'
            raise KeyedError((*table, "budget_bits"), rule, low_rank.budget_bits)
        if iterations > 1:
            rule = "must be left out: ranks are shared out by the errors of one rounding, iterations are"
            raise KeyedError((*table, "budget_bits"), f"{rule} {iterations}", low_rank.budget_bits)

    def _check_transforms(self) -> None:
        """The transforms can follow one another, and every linear can be transformed as they say."""
        quantize = self.quantize
        if (unsupported_reason := unsupported_order(quantize.transforms)) is not None:
            raise KeyedError(("quantize", "transforms"), unsupported_reason)
        method = quantize.method
        for override in (None, *quantize.override):
            weight, activation = (
                (override and getattr(override, key)) or getattr(quantize, key) for key in ("weight", "activation")
            )
            rounding = (override and override.rounding) or quantize.chosen_rounding
            scheme = Scheme(
                self.formats[weight],
                None if activation == NOT_QUANTIZED else self.formats[activation],
                method.statistics | rounding.statistics,
            )
            for i, transform in enumerate(quantize.transforms):
                if (unsupported_reason := transform.unsupported_reason(scheme)) is not None:
                    rule = f'{unsupported_reason} (method "{method.kind}", weights "{weight}")'
                    raise KeyedError(("quantize", "transforms", i), rule, transform.kind)

    def _check_block_parts(self) -> None:
        """Parts that work on whole blocks have what they need, and nobody undoes their work."""
        quantize, usual = self.quantize, self.quantize.chosen_rounding
        for loc, rounding in quantize.roundings.items():
            if rounding.together != usual.together or (rounding.together and rounding != usual):
                rule = "must be left out: the linears of a block are rounded together, by one rounding"
                raise KeyedError(loc, rule, rounding.kind)
        if not quantize.block_parts:
            return
        parts = " and ".join(quantize.block_parts)
        if quantize.propagate_error is False:
            rule = f"must be true (or unset): {parts} calibrates on the outputs of the already quantized blocks"
            raise KeyedError(("quantize", "propagate_error"), rule, False)
        for i, transform in enumerate(quantize.transforms):
            if transform.level == "linear" and usual.together:
                rule = f'must not be beside rounding "{usual.kind}", which rounds weights in their own basis'
                raise KeyedError(("quantize", "transforms", i), rule, transform.kind)
            if transform.fixes_scales:
                self._check_scales_are_kept(("quantize", "transforms", i), transform)
        if usual.together:
            self._check_rounds_first(("quantize", "rounding"), usual)

    def _check_scales_are_kept(self, loc: Loc, transform: Transform) -> None:
        for rounding in self.quantize.roundings.values():
            if not rounding.keeps_scales:
                kept = ", ".join(kind for kind, part in ROUNDINGS.items() if part.keeps_scales)
                rule = f'must not be beside rounding "{rounding.kind}", which fits its own scales (allowed: {kept})'
                raise KeyedError(loc, rule, transform.kind)
        self._check_rounds_first(loc, transform)

    def _check_rounds_first(self, loc: Loc, part: Component) -> None:
        """Weights that are rounded with their block are rounded once, before anything is reconstructed."""
        method, iterations = self.quantize.method, self.quantize.low_rank.iterations
        if not method.rounds_first or (iterations or method.iterations) > 1:
            rule = f'needs a method that rounds the weight itself, once; "{method.kind}" rounds what A·B leaves of it'
            raise KeyedError(loc, rule, part.kind)

    def _check_finetune(self) -> None:
        """What is to be trained is there, gradients reach it, and it can be stored."""
        finetune, quantize = self.finetune, self.quantize
        if finetune is None:
            return
        loc: Loc = ("finetune", "parts")
        activations = [quantize.activation, *(override.activation for override in quantize.override)]
        if {*activations, quantize.attention} - {NOT_QUANTIZED, None}:
            rule = "gradients do not pass the rounding of activations: quantize.activation and attention must be none"
            raise KeyedError(loc, rule)
        if "rht_signs" in finetune.parts and not any(part.kind == "hadamard" for part in quantize.transforms):
            raise KeyedError(loc, 'there are no signs to train without quantize.transforms = ["hadamard"]', "rht_signs")
        if "low_rank" not in finetune.parts:
            return
        own = [override.low_rank.rank for override in quantize.override if override.low_rank is not None]
        if not quantize.low_rank.rank and quantize.low_rank.budget_bits is None and not any(own):
            raise KeyedError(loc, "there is nothing to train where quantize.low_rank.rank is 0", "low_rank")
        if self.evaluation.backend == "triton":
            rule = "kernels run one A and one B, not trained columns beside them: evaluation.backend must not be triton"
            raise KeyedError(loc, rule, "low_rank")
        self._check_columns(quantize.low_rank, finetune.columns, "")
        for i, override in enumerate(quantize.override):
            self._check_columns(quantize.low_rank_under(override), finetune.columns, f" (quantize.override.{i})")

    def _check_columns(self, low_rank: LowRankConfig, columns: int, where: str) -> None:
        """The first columns of A and rows of B can be stored apart from the others, if there are others."""
        if low_rank.budget_bits is None and low_rank.rank <= columns:
            return
        formats = (low_rank.format, low_rank.format_b or low_rank.format)
        for rank_dim, axis, name in zip((1, 0), FACTOR_AXES[low_rank.axis], formats):
            if axis != rank_dim or name == NOT_QUANTIZED:
                continue
            if (unsupported_reason := unsupported_cut(self.formats[name], columns)) is not None:
                rule = f'cannot be cut off "{name}", whose blocks run along the rank: {unsupported_reason}{where}'
                raise KeyedError(("finetune", "columns"), rule, columns)

    def _check_blockwise(self) -> None:
        evaluation = self.evaluation
        if not evaluation.blockwise:
            return
        loc = ("evaluation", "blockwise")
        if evaluation.downstream is not None:
            raise KeyedError(loc, "must be false with evaluation.downstream, whose tasks call the whole model")
        if evaluation.perplexity is not None and evaluation.perplexity.protocol == "lm-eval":
            raise KeyedError(loc, 'must be false with protocol "lm-eval", which scores the whole model')
        if self.device_map == "auto":
            raise KeyedError(loc, 'must be false with device_map = "auto": a block at a time needs one GPU')

    def _check_format(self, loc: Loc, name: str, optional: bool = True) -> None:
        if name == NOT_QUANTIZED and optional:
            return
        if name not in self.formats:
            allowed = (*self.formats, *([NOT_QUANTIZED] if optional else []))
            raise KeyedError(loc, "no such number format under [formats]", name, allowed)
        if loc[-1] != "weight" and self.formats[name].kind == "codebook":
            raise KeyedError(loc, "must not be a codebook, which is learned from a weight", name)


class KeyedError(ValueError):
    """A rule across sections was broken at one key; the reader turns it into the usual one line."""

    def __init__(self, loc: Loc, rule: str, found: object = None, allowed: tuple[str, ...] | None = None):
        super().__init__(rule)
        self.loc, self.rule, self.found, self.allowed = loc, rule, found, allowed
