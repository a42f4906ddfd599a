"""The section [quantize]: the formats, roundings, transforms and factors of linears, and what overrides them by name.

A number format is defined once under [formats] and referred to by its name. The reserved name "none" stands for "not
quantized", so that a command line can switch off what a preset switched on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lqer.config.section import Loc, Positive, Section
from lqer.config.specs import MethodSpec, RoundingSpec, TransformSpec
from lqer.lowrank.solver import Solver
from lqer.methods import LqerAct
from lqer.methods.base import FactorAxis
from lqer.rounding import Nearest, Rounding
from lqer.transforms import Quarot

NOT_QUANTIZED = "none"

Strength = Annotated[float, Field(ge=0, le=1)]
FormatName = str


class LowRankConfig(Section):
    """The low-rank factors A and B: y = x·Wᵀ + x·A·B."""

    rank: Annotated[int, Field(ge=0)] = 0
    # The format of A and B, unless B has its own.
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
    # None: the method's own, or nearest.
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
