"""Bytes of a run's statistics, and whether they are stored.

Linears of one module with equal in_features count as one input site, except the last, which reads what the others
produce.
"""

from __future__ import annotations

from lqer.config import Config
from lqer.methods import Plans
from lqer.models.summary import ModelSummary
from lqer.resources.linear import is_of_expert
from lqer.stages.gather_experts import PASS_BYTES
from lqer.stages.quantize_linears import requested_statistics
from lqer.statistics import ALWAYS, Statistic

# calibration.keep = "auto" stores statistics up to this size: a sweep then calibrates once. Magnitudes of any model and
# E[x xᵀ] of one with a billion parameters take less; E[x xᵀ] of 7 billion take 22 GB, more than gathering takes time.
KEPT_BYTES = 4_000_000_000


def input_sites(summary: ModelSummary) -> list[int]:
    """in_features of every input site of one block: the one with most linears, since not all may have experts."""
    return [width for widths in _modules(summary).values() for width in widths]


def weighted_sites(summary: ModelSummary) -> int:
    """How many input sites of one block see all tokens, as those of experts do not."""
    modules = _modules(summary).items()
    return sum(len(widths) for name, widths in modules if not is_of_expert(f"{name}.", summary.blocks_name))


def _modules(summary: ModelSummary) -> dict[str, list[int]]:
    """The same by module, whose name ends with a number if it is an expert."""
    blocks: dict[str, dict[str, list[int]]] = {}
    for name, (_, in_features) in summary.linears.items():
        block = name.removeprefix(f"{summary.blocks_name}.").partition(".")[0]
        blocks.setdefault(block, {}).setdefault(name.rpartition(".")[0], []).append(in_features)
    largest = max(blocks.values(), key=lambda modules: sum(map(len, modules.values())))
    return {name: [*sorted(set(widths[:-1])), widths[-1]] for name, widths in largest.items()}


def gathered(plans: Plans) -> list[Statistic]:
    """The statistics that are gathered for these plans."""
    return [*ALWAYS, *requested_statistics(plans)]


def accumulator_bytes(summary: ModelSummary, plans: Plans, on_gpu: bool) -> int:
    """Bytes for the sites of a block whose statistics are gathered together: on a GPU not those of all experts."""
    experts, others = _accumulated(summary, plans)
    held = min(sum(experts), max(PASS_BYTES, *experts)) if on_gpu and experts else sum(experts)
    return others + held


def in_passes(summary: ModelSummary, plans: Plans, on_gpu: bool) -> bool:
    """Whether a block's experts are observed in several passes: its statistics then are in RAM, not on the GPU."""
    return on_gpu and sum(_accumulated(summary, plans)[0]) > PASS_BYTES


def _accumulated(summary: ModelSummary, plans: Plans) -> tuple[list[int], int]:
    """The bytes of each expert's accumulators, and of all others."""
    sizes = {
        name: sum(statistic.nbytes(width) for width in widths for statistic in gathered(plans))
        for name, widths in _modules(summary).items()
    }
    experts = [size for name, size in sizes.items() if name.rpartition(".")[2].isdigit()]
    return experts, sum(sizes.values()) - sum(experts)


def block_bytes(config: Config, summary: ModelSummary, plans: Plans, computed: int) -> int:
    """The bytes of one block's statistics. computed: bytes of a value in the run's dtype."""
    calibration = config.calibration
    sample = min(calibration.error_tokens, calibration.num_samples * calibration.seq_len) * computed
    return sum(
        sample * width + sum(statistic.result_nbytes(width) for statistic in gathered(plans))
        for width in input_sites(summary)
    )


def keeps_statistics(config: Config, summary: ModelSummary, plans: Plans, computed: int) -> bool:
    """Whether statistics of the original model are stored: `calibration.keep`.

    "auto": where the run reads them more than once, or they take no more than KEPT_BYTES.
    """
    if config.calibration.keep != "auto":
        return config.calibration.keep
    quantize = config.quantize
    budgets = quantize.budget_bits, quantize.low_rank.budget_bits
    if any(budget is not None for budget in budgets) or "rtn" in config.evaluation.baselines:
        return True
    return block_bytes(config, summary, plans, computed) * summary.blocks <= KEPT_BYTES
