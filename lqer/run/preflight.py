"""Checks before a run: `--validate`, and the estimate of the memory and disk that it needs.

Shapes: W windows, T tokens of a window.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lqer.config import Config
from lqer.config.quantize import NOT_QUANTIZED, LowRankConfig
from lqer.data.pairs import holds_pairs
from lqer.errors import HubError, HubTextError, ModelError, RunFolderError
from lqer.evaluation.downstream import check_task_data
from lqer.export import Target
from lqer.export.planned import check_planned
from lqer.models.source import load_model_config, load_processor, load_tokenizer, stored_block_bytes
from lqer.models.summary import ModelSummary
from lqer.phases import phase
from lqer.report.tracking import require_tracker
from lqer.resources.check import refuse_what_cannot_fit, table
from lqer.resources.machine import gpu_bytes, read_machine
from lqer.resources.memory import estimate
from lqer.resources.workload import StageMemory, Workload
from lqer.run.context import RunContext, prepare
from lqer.run.experiment import Experiment
from lqer.run.exports import check_export_folders
from lqer.run.folder import run_folder
from lqer.run.plan import plan_experiment
from lqer.run.texts import Texts, read_texts
from lqer.stages.evaluate import task_files
from lqer.store.store import Store, stored_bytes


@dataclass(frozen=True)
class CheckedRun:
    """A run that has passed every check; nothing has been written or built."""

    context: RunContext
    folder: Path
    store: Store
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    experiment: Experiment
    exports: list[Target]


def check_run(config: Config, say: Callable[[str], None], card_share: float = 1.0) -> CheckedRun:
    """Check everything that can be checked before any work: model, texts, tasks, output folder, memory and disk.

    say: prints a line for the user. card_share: how much of a GPU's memory there is for it. Raises LqerError.
    """
    folder = run_folder(config)
    _check_writable(folder)
    if config.tracking is not None:
        require_tracker(config.tracking)
    context = prepare(config)
    exports = check_planned(config, context.source, context.summary, context.plans, context.choices)
    check_export_folders(folder, exports)
    for target in exports:
        if (missing := target.missing_reader()) is not None:
            say(f"warning: export {target.kind} will not be verified: {missing} is not installed")
    store = Store(context.store_path, say)
    with phase("texts"):
        tokenizer = load_tokenizer(context.source)
        processor = load_processor(context.source) if holds_pairs(config.calibration.dataset) else None
        texts = read_texts(config, tokenizer, processor)
    _check_tokens(context.summary, texts, say)
    for overlap in texts.overlaps:
        say(f"warning: {overlap}")
    experiment = plan_experiment(context, tokenizer, texts)
    _check_tasks(config, experiment, store)
    check_fit(context, say, experiment.paths(store), card_share)
    return CheckedRun(context, folder, store, tokenizer, texts, experiment, exports)


def _check_writable(folder: Path) -> None:
    """Raise RunFolderError where no file can be created in the nearest existing folder."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise RunFolderError(f"output_dir: {nearest} cannot be written to: {error.strerror}") from None


def _check_tasks(config: Config, experiment: Experiment, store: Store) -> None:
    """Load the data of the tasks, unless every candidate's accuracy is in the store."""
    settings = config.evaluation.downstream
    if settings is not None and any(stage.find(store) is None for stage in experiment.downstream.values()):
        check_task_data(task_files(settings), config.evaluation.blockwise)


def _check_tokens(summary: ModelSummary, texts: Texts, say: Callable[[str], None]) -> None:
    """Compare token ids and window lengths with what the model can embed.

    Raises ModelError for an id without an embedding and for windows longer than a table of positions; windows that are
    only longer than the model was trained on get a warning.
    """
    evaluation = [text.windows_WT for text in texts.evaluation if text.windows_WT is not None]
    by_key = {
        "calibration.seq_len": [texts.calibration.windows_WT, texts.widths_WT],
        "finetune.seq_len": [] if texts.training_WT is None else [texts.training_WT],
        "evaluation.perplexity.seq_len": evaluation,
    }
    for key, windows in by_key.items():
        if not windows:
            continue
        largest, length = max(int(windows_WT.max()) for windows_WT in windows), windows[0].shape[1]
        if largest >= summary.embedded_ids:
            raise ModelError(
                f"model: the tokenizer gives token id {largest}, but the embedding has {summary.embedded_ids} rows: "
                "tokenizer and model do not belong together"
            )
        if summary.max_positions is None or length <= summary.max_positions:
            continue
        told = f"{key} {length} exceeds the {summary.max_positions} positions of {summary.architecture}"
        if summary.learnt_positions:
            raise ModelError(f"{told}, which are a table of embeddings")
        say(f"warning: {told}; quality beyond them is not what the model was trained for")


def describe(config: Config, say: Callable[[str], None]) -> None:
    """What `--validate` prints: a summary of the experiment, checked as a run would be.

    A model or dataset of the hub that cannot be reached is reported and left unchecked. Raises LqerError if the
    experiment cannot run on this machine.
    """
    quantize = config.quantize
    say(f"{config.tag}: {config.model}")
    say(
        f"method {quantize.method.kind}, {_shown_rank(quantize.low_rank)}; weights {_shown_weights(config)}; "
        f"activations {_shown(config, quantize.activation)}; A and B {_shown(config, quantize.low_rank.format)}; "
        f"attention operands {_shown(config, quantize.attention)}"
    )
    if quantize.transforms:
        say(f"transforms {', '.join(transform.kind for transform in quantize.transforms)}")
    try:
        context = check_run(config, say).context
    except HubError as error:
        say(f"not checked against the model: {error}")
    except HubTextError as error:
        say(f"not checked against the texts: {error}")
    else:
        planned = sum(plan is not None for plan in context.plans.values())
        say(f"{planned} of {len(context.plans)} linears in {context.summary.blocks} blocks are quantized")
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
            # A gang's states are in RAM.
            near_bytes=gpu_bytes(context.device) or 0 if context.ranks == 1 else 0,
            # A GGUF file is expanded in one piece. Others that are loaded whole are known once they are opened.
            streams=not context.source.load_args,
            read_block=stored_block_bytes(context.source),
        )
    )


def check_fit(
    context: RunContext, say: Callable[[str], None], made: Mapping[str, list[Path]], card_share: float = 1.0
) -> None:
    """Print the estimate; raise DoesNotFitError if the run needs more than the machine has.

    made: the folders of the artifacts, by stage; bytes that they already hold are not needed again.
    """
    stages = estimate_stages(context)
    machine = read_machine(context.device, context.store_path, card_share)
    say(table(stages, machine))
    finished = {stage for stage, paths in made.items() if paths and all(path.exists() for path in paths)}
    stored = {stage: sum(map(stored_bytes, paths)) for stage, paths in made.items()}
    refuse_what_cannot_fit([stage for stage in stages if stage.name not in finished], machine, stored)


def _shown_rank(low_rank: LowRankConfig) -> str:
    return f"rank {low_rank.rank}" if low_rank.budget_bits is None else f"ranks within {low_rank.budget_bits:g} bits"


def _shown_weights(config: Config) -> str:
    quantize = config.quantize
    if quantize.budget_bits is None:
        return _shown(config, quantize.weight)
    return f"{', '.join(_shown(config, name) for name in quantize.widths)} within {quantize.budget_bits:g} bits"


def _shown(config: Config, format_name: str) -> str:
    if format_name == NOT_QUANTIZED:
        return "not quantized"
    number_format = config.formats[format_name]
    return f"{format_name} ({number_format.kind}, {number_format.nominal_bits:g} bits)"
