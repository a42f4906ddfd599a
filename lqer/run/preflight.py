"""Checks before a run: `--validate`, and the estimate of the memory and disk that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lqer.config import Config
from lqer.config.schema import NOT_QUANTIZED, LowRankConfig
from lqer.errors import HubError
from lqer.models.source import load_model_config
from lqer.resources.check import refuse_what_cannot_fit, table
from lqer.resources.machine import read_machine
from lqer.resources.memory import StageMemory, Workload, estimate
from lqer.run.context import RunContext, prepare
from lqer.store.store import stored_bytes


def describe(config: Config, say: Callable[[str], None]) -> None:
    """What `--validate` prints: a summary of the experiment, checked against the model if it is available.

    Raises LqerError if the experiment cannot run on this machine.
    """
    quantize = config.quantize
    say(f"{config.tag}: {config.model}")
    say(
        f"method {quantize.method.kind}, {_shown_rank(quantize.low_rank)}; weights {_shown(config, quantize.weight)}; "
        f"activations {_shown(config, quantize.activation)}; A and B {_shown(config, quantize.low_rank.format)}; "
        f"attention operands {_shown(config, quantize.attention)}"
    )
    if quantize.transforms:
        say(f"transforms {', '.join(transform.kind for transform in quantize.transforms)}")
    try:
        context = prepare(config)
    except HubError as error:
        say(f"not checked against the model: {error}")
    else:
        planned = sum(plan is not None for plan in context.plans.values())
        say(f"{planned} of {len(context.plans)} linears in {context.summary.blocks} blocks are quantized")
        check_fit(context, say, {})
    say("valid")


def estimate_stages(context: RunContext) -> list[StageMemory]:
    """The memory and disk that the run needs, by stage."""
    stored = getattr(load_model_config(context.source), "dtype", None) or context.dtype
    return estimate(
        Workload(
            config=context.config,
            summary=context.summary,
            plans=context.plans,
            stored=stored.itemsize,
            computed=context.dtype.itemsize,
            on_gpu=context.device.type == "cuda",
            # A GGUF file is expanded in one piece. Others that are loaded whole are known once they are opened.
            streams=not context.source.load_args,
        )
    )


def check_fit(context: RunContext, say: Callable[[str], None], made: Mapping[str, list[Path]]) -> None:
    """Print the estimate; raise DoesNotFitError if the run needs more than the machine has.

    made: the folders of the artifacts, by stage; bytes that they already hold are not needed again.
    """
    stages = estimate_stages(context)
    machine = read_machine(context.device, context.store_path)
    say(table(stages, machine))
    finished = {stage for stage, paths in made.items() if paths and all(path.exists() for path in paths)}
    stored = {stage: sum(map(stored_bytes, paths)) for stage, paths in made.items()}
    refuse_what_cannot_fit([stage for stage in stages if stage.name not in finished], machine, stored)


def _shown_rank(low_rank: LowRankConfig) -> str:
    return f"rank {low_rank.rank}" if low_rank.budget_bits is None else f"ranks within {low_rank.budget_bits:g} bits"


def _shown(config: Config, format_name: str) -> str:
    if format_name == NOT_QUANTIZED:
        return "not quantized"
    number_format = config.formats[format_name]
    return f"{format_name} ({number_format.kind}, {number_format.bits_per_value(4096):g} bits)"
