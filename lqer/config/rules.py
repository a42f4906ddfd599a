"""Rules that tie several sections of a configuration together: each a function that yields the keys that break it.

The sections themselves (schema.py, quantize.py, evaluation.py) only know what a key may hold. The reader reports the
first broken rule; a rule may rely on those before it in `RULES`, in particular on every named number format to exist.
"""

from __future__ import annotations

from collections.abc import Iterator

from lqer.components import Component
from lqer.config.files import shortened
from lqer.config.quantize import NOT_QUANTIZED, LowRankConfig
from lqer.config.rank_rules import budget_can_be_allocated, ranks_are_reconstructed, widths_can_be_allocated
from lqer.config.rule import KeyedError, Rule
from lqer.config.schema import Config
from lqer.config.section import Loc
from lqer.formats import unsupported_cut
from lqer.methods.base import FACTOR_AXES
from lqer.rounding import ROUNDINGS, Rounding
from lqer.transforms import Scheme, Transform, unsupported_order

# The name of a file or folder may have this many bytes on every file system in use.
MAX_NAME_BYTES = 200
# Holds the artifacts of all runs, next to their folders.
STORE_FOLDER = "store"


def names_are_free(config: Config) -> Iterator[KeyedError]:
    """The tag can be a folder, and no number format takes the reserved name."""
    tag = config.tag
    if not tag.strip() or "/" in tag or tag.startswith((".", "-")) or not tag.isprintable() or tag == STORE_FOLDER:
        yield KeyedError(("tag",), f'must be a plain folder name other than "{STORE_FOLDER}"', found=tag)
    for key, name in (("tag", tag), ("output_dir", config.output_dir)):
        if not name.isprintable() or any(len(part.encode()) > MAX_NAME_BYTES for part in name.split("/")):
            rule = f"must be printable, each part of the path at most {MAX_NAME_BYTES} bytes"
            yield KeyedError((key,), rule, found=shortened(name))
    if NOT_QUANTIZED in config.formats:
        yield KeyedError(("formats", NOT_QUANTIZED), 'the name "none" is reserved for "not quantized"')


def formats_exist(config: Config) -> Iterator[KeyedError]:
    """Every number format that is named somewhere is defined, and can be used there."""
    for loc, name in _named_formats(config):
        optional = loc[-1] != "weight" and "widths" not in loc
        if name == NOT_QUANTIZED and optional:
            continue
        if name not in config.formats:
            allowed = (*config.formats, *([NOT_QUANTIZED] if optional else []))
            yield KeyedError(loc, "no such number format under [formats]", name, allowed)
        elif optional and config.formats[name].kind == "codebook":
            yield KeyedError(loc, "must not be a codebook: codebooks are learned from weights", name)
        elif optional and config.formats[name].kind == "trellis":
            yield KeyedError(loc, "must not be a trellis: its codes are searched for tiles of a weight", name)


def _named_formats(config: Config) -> Iterator[tuple[Loc, str]]:
    quantize = config.quantize
    for key in ("weight", "activation", "bias", "attention"):
        yield ("quantize", key), getattr(quantize, key)
    for i, name in enumerate(quantize.widths):
        yield ("quantize", "widths", i), name
    for key in ("format", "format_b"):
        if (name := getattr(quantize.low_rank, key)) is not None:
            yield ("quantize", "low_rank", key), name
    for i, override in enumerate(quantize.override):
        for key in ("weight", "activation", "bias"):
            if (name := getattr(override, key)) is not None:
                yield ("quantize", "override", i, key), name
        for key in ("format", "format_b"):
            if override.low_rank and (name := getattr(override.low_rank, key)) is not None:
                yield ("quantize", "override", i, "low_rank", key), name


def blockwise_evaluates_windows(config: Config) -> Iterator[KeyedError]:
    """What is evaluated one block at a time needs nothing but the logits of batches that are known beforehand."""
    evaluation, loc = config.evaluation, ("evaluation", "blockwise")
    if not evaluation.blockwise:
        return
    if evaluation.perplexity is not None and evaluation.perplexity.protocol == "lm-eval":
        yield KeyedError(loc, 'must be false with protocol "lm-eval", which scores the whole model')
    if config.device_map == "auto":
        yield KeyedError(loc, 'must be false with device_map = "auto": blockwise evaluation uses one GPU')


def rounded_inputs_are_rounded(config: Config) -> Iterator[KeyedError]:
    """Statistics of rounded inputs need linears that round them."""
    quantize = config.quantize
    activations = {quantize.activation, *(override.activation for override in quantize.override)}
    if config.calibration.round_inputs and not activations - {NOT_QUANTIZED, None}:
        rule = 'must be false while quantize.activation is "none": no input is rounded'
        yield KeyedError(("calibration", "round_inputs"), rule, True)


def stored_statistics_are_kept(config: Config) -> Iterator[KeyedError]:
    """The losses of widths are measured from the last block to the first, which statistics on the way cannot follow."""
    if config.quantize.budget_bits is not None and config.calibration.keep is False:
        rule = 'must be "auto" or true with quantize.budget_bits, which reads stored statistics'
        yield KeyedError(("calibration", "keep"), rule, False)


def divergence_has_windows(config: Config) -> Iterator[KeyedError]:
    """Divergence is measured on the windows of perplexity texts, against the original model."""
    evaluation, loc = config.evaluation, ("evaluation", "divergence")
    if evaluation.divergence is None:
        return
    if evaluation.perplexity is None:
        yield KeyedError(loc, "requires evaluation.perplexity, whose texts and windows it uses")
    elif evaluation.perplexity.protocol == "lm-eval":
        yield KeyedError(loc, 'must be unset with protocol "lm-eval", which scores documents, not windows')
    if "original" not in evaluation.baselines:
        yield KeyedError(loc, 'requires "original" in evaluation.baselines: it is the distance from that model')


def roundings_fit(config: Config) -> Iterator[KeyedError]:
    """The rounding is the method's, and supports the formats of the weights."""
    quantize = config.quantize
    own, named = quantize.method.rounding, quantize.rounding
    if own is not None and named is not None and named.kind != own.kind:
        rule = f'method "{quantize.method.kind}" always uses rounding "{own.kind}"'
        yield KeyedError(("quantize", "rounding"), f"{rule}; remove this key or set its options only", named.kind)
    usual = quantize.chosen_rounding
    names = dict.fromkeys((quantize.weight, *quantize.widths))
    pairs: list[tuple[Loc, Rounding, str]] = [(("quantize", "rounding"), usual, name) for name in names]
    for i, override in enumerate(quantize.override):
        rounding = override.rounding or usual
        key = "weight" if override.rounding is None else "rounding"
        pairs += [(("quantize", "override", i, key), rounding, name) for name in quantize.weights_under(override)]
    for loc, rounding, weight in pairs:
        if (reason := quantize.method.unsupported_reason(rounding)) is not None:
            yield KeyedError(loc, reason, rounding.kind)
        if (reason := rounding.unsupported_reason(config.formats[weight])) is not None:
            yield KeyedError(loc, f'{reason} (weights are "{weight}")', rounding.kind)


def transforms_fit(config: Config) -> Iterator[KeyedError]:
    """The transforms can be combined in this order, and apply to every linear's formats and statistics."""
    quantize, method = config.quantize, config.quantize.method
    if (reason := unsupported_order(quantize.transforms)) is not None:
        yield KeyedError(("quantize", "transforms"), reason)
    for override, weight in [(one, name) for one in (None, *quantize.override) for name in quantize.weights_under(one)]:
        activation = (override and override.activation) or quantize.activation
        rounding = (override and override.rounding) or quantize.chosen_rounding
        scheme = Scheme(
            config.formats[weight],
            None if activation == NOT_QUANTIZED else config.formats[activation],
            method.statistics | rounding.statistics,
        )
        for i, transform in enumerate(quantize.transforms):
            if (reason := transform.unsupported_reason(scheme)) is not None:
                rule = f'{reason} (method "{method.kind}", weights "{weight}")'
                yield KeyedError(("quantize", "transforms", i), rule, transform.kind)


def pairs_differ(config: Config) -> Iterator[KeyedError]:
    """Statistics of pairs of inputs need a quantized model whose inputs differ from the original model's."""
    paired = config.quantize.paired_statistics
    if paired and config.quantize.propagate_error is False:
        verb = "compares" if len(paired) == 1 else "compare"
        rule = f"{' and '.join(paired)} {verb} the quantized model's inputs with the original model's"
        yield KeyedError(("quantize", "propagate_error"), f"must be true (or unset): {rule}", False)


def order_is_that_of_propagation(config: Config) -> Iterator[KeyedError]:
    """Only with error propagation do linears see what the linears before them compute."""
    quantize = config.quantize
    if quantize.order == "sequential" and quantize.propagate_error is False:
        rule = (
            'must be true (or unset): in the order "sequential" linears see inputs from the quantized ones before them'
        )
        yield KeyedError(("quantize", "propagate_error"), rule, False)


def blocks_can_be_reconstructed(config: Config) -> Iterator[KeyedError]:
    """Components that work on whole blocks see the quantized model's inputs, and nothing undoes their result."""
    quantize, usual = config.quantize, config.quantize.chosen_rounding
    for loc, rounding in quantize.roundings.items():
        if rounding.together != usual.together or (rounding.together and rounding != usual):
            rule = "must be unset: one rounding rounds all linears of a block together"
            yield KeyedError(loc, rule, rounding.kind)
    if not quantize.block_parts:
        return
    if quantize.propagate_error is False:
        verb = "calibrates" if len(quantize.block_parts) == 1 else "calibrate"
        rule = f"{' and '.join(quantize.block_parts)} {verb} on the outputs of the already quantized blocks"
        yield KeyedError(("quantize", "propagate_error"), f"must be true (or unset): {rule}", False)
    for i, transform in enumerate(quantize.transforms):
        loc = ("quantize", "transforms", i)
        if transform.level == "linear" and usual.together:
            rule = f'cannot be combined with rounding "{usual.kind}", which does not support rotated linears'
            yield KeyedError(loc, rule, transform.kind)
        if transform.fixes_scales:
            yield from _scales_are_kept(config, loc, transform)
    if usual.together:
        yield from _weight_is_rounded_once(config, ("quantize", "rounding"), usual)


def _scales_are_kept(config: Config, loc: Loc, transform: Transform) -> Iterator[KeyedError]:
    for rounding in config.quantize.roundings.values():
        if not rounding.keeps_scales:
            keeping = ", ".join(kind for kind, other in ROUNDINGS.items() if _can_keep_scales(other))
            rule = (
                f'cannot be combined with rounding "{rounding.kind}", which fits its own scales; use one of {keeping}'
            )
            yield KeyedError(loc, rule, transform.kind)
    yield from _weight_is_rounded_once(config, loc, transform)


def _can_keep_scales(rounding: type[Rounding]) -> bool:
    """Whether it does so under some of its settings."""
    return rounding.keeps_scales is not Rounding.keeps_scales


def _weight_is_rounded_once(config: Config, loc: Loc, component: Component) -> Iterator[KeyedError]:
    method, iterations = config.quantize.method, config.quantize.low_rank.iterations
    if not method.rounds_first or (iterations or method.iterations) > 1:
        rule = f'needs a method that rounds W itself, once; "{method.kind}" rounds W minus the low-rank factors'
        yield KeyedError(loc, rule, component.kind)


def asymmetric_targets_are_rounded(config: Config) -> Iterator[KeyedError]:
    """Weights that are rounded to a block's outputs have no target of their own."""
    quantize = config.quantize
    rounding: Component | None = next((part for part in quantize.transforms if part.fixes_scales), None)
    if quantize.chosen_rounding.together:
        rounding = quantize.chosen_rounding
    strengths: dict[Loc, float | None] = {("quantize", "asymmetric"): quantize.asymmetric}
    for i, override in enumerate(quantize.override):
        strengths["quantize", "override", i, "asymmetric"] = override.asymmetric
    for loc, strength in strengths.items():
        if strength and rounding is not None:
            yield KeyedError(loc, f'must be 0 with "{rounding.kind}", which rounds weights to outputs', strength)


def finetuned_parts_exist(config: Config) -> Iterator[KeyedError]:
    """What is trained exists and can be stored."""
    finetune, quantize, loc = config.finetune, config.quantize, ("finetune", "parts")
    if finetune is None:
        return
    if "rht_signs" in finetune.parts and not any(part.kind == "hadamard" for part in quantize.transforms):
        yield KeyedError(loc, 'requires quantize.transforms = ["hadamard"]: there are no signs to train', "rht_signs")
    trainable = (config.formats[name].trainable_parts - {"codes"} for name in _used(config))
    if "scales" in finetune.parts and not any(trainable):
        yield KeyedError(loc, "requires a number format whose scales are floating-point numbers", "scales")
    if "low_rank" not in finetune.parts:
        return
    own = [override.low_rank.rank for override in quantize.override if override.low_rank is not None]
    if not quantize.low_rank.rank and quantize.low_rank.budget_bits is None and not any(own):
        yield KeyedError(loc, "there are no factors to train: quantize.low_rank.rank is 0", "low_rank")
    if config.evaluation.backend == "triton":
        rule = 'evaluation.backend must not be "triton", which does not support fine-tuned low-rank factors'
        yield KeyedError(loc, rule, "low_rank")
    yield from _columns_can_be_cut(config, quantize.low_rank, finetune.columns, "")
    for i, override in enumerate(quantize.override):
        low_rank = quantize.low_rank_under(override)
        yield from _columns_can_be_cut(config, low_rank, finetune.columns, f" (quantize.override.{i})")


def _used(config: Config) -> set[str]:
    """The number formats of weights, A and B."""
    quantize = config.quantize
    low_ranks = [quantize.low_rank, *(quantize.low_rank_under(override) for override in quantize.override)]
    names = {quantize.weight, *quantize.widths, *(override.weight for override in quantize.override)}
    names |= {name for low_rank in low_ranks for name in (low_rank.format, low_rank.format_b)}
    return {name for name in names if name is not None and name != NOT_QUANTIZED}


def _columns_can_be_cut(config: Config, low_rank: LowRankConfig, columns: int, where: str) -> Iterator[KeyedError]:
    """The first columns of A and rows of B can be stored apart from the others, if there are others."""
    if low_rank.budget_bits is None and low_rank.rank <= columns:
        return
    formats = (low_rank.format, low_rank.format_b or low_rank.format)
    for rank_dim, axis, name in zip((1, 0), FACTOR_AXES[low_rank.axis], formats):
        if axis != rank_dim or name == NOT_QUANTIZED:
            continue
        if (reason := unsupported_cut(config.formats[name], columns)) is not None:
            rule = f'must be whole blocks of "{name}", whose blocks run along the rank: {reason}{where}'
            yield KeyedError(("finetune", "columns"), rule, columns)


def published_figures_are_measured(config: Config) -> Iterator[KeyedError]:
    """A run can be compared with a figure only where it measures the same quantity."""
    published, evaluation = config.published, config.evaluation
    if published is None:
        return
    if not published.perplexity and not published.accuracy:
        yield KeyedError(("published",), "must give a perplexity or an accuracy of some model")
    texts = () if evaluation.perplexity is None else tuple(spec.label for spec in evaluation.perplexity.datasets)
    if published.perplexity and published.text not in texts:
        rule = "must be a text of evaluation.perplexity.datasets"
        yield KeyedError(("published", "text"), rule, published.text, texts)
    if published.accuracy and evaluation.downstream is None:
        yield KeyedError(("published", "accuracy"), "requires evaluation.downstream: nothing else measures it")


def clusters_choose_gpus(config: Config) -> Iterator[KeyedError]:
    """Each worker and each rank of a gang has GPUs of its own; all ranks read the folder that the first one writes."""
    cluster = config.cluster
    if cluster is None or (config.ray is None and cluster.gang == 1):
        return
    if ":" in config.device:
        asked_by = f"address is {cluster.address!r}" if cluster.gang == 1 else f"gang is {cluster.gang!r}"
        yield KeyedError(("device",), f"must name no GPU where cluster.{asked_by}", config.device)
    if config.ray is not None and cluster.gang != 1 and not cluster.shares_folder:
        yield KeyedError(("cluster", "gang"), 'requires cluster.store = "shared"', cluster.gang)


RULES: tuple[Rule, ...] = (
    names_are_free,
    blockwise_evaluates_windows,
    divergence_has_windows,
    formats_exist,
    rounded_inputs_are_rounded,
    stored_statistics_are_kept,
    roundings_fit,
    ranks_are_reconstructed,
    budget_can_be_allocated,
    widths_can_be_allocated,
    transforms_fit,
    pairs_differ,
    order_is_that_of_propagation,
    blocks_can_be_reconstructed,
    asymmetric_targets_are_rounded,
    finetuned_parts_exist,
    published_figures_are_measured,
    clusters_choose_gpus,
)


def broken_rules(config: Config) -> Iterator[KeyedError]:
    """All broken rules, lazily: what follows the first may be its consequence, or fail for the same reason."""
    for rule in RULES:
        yield from rule(config)
