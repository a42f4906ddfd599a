"""The stages of a run from nothing, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lqer.config import Config
from lqer.resources.linears import ROUNDING_PASSES, linear_work, packed_bytes, solving
from lqer.resources.steps import BlockSteps
from lqer.resources.walk import Walk, accumulators, gathers_products, observing_bytes, observing_flops, statistics_bytes
from lqer.resources.whole import finetuning, rotation
from lqer.resources.workload import OUTPUT_DIR, SAFETENSORS, Piece, Stage, Workload, input_sites

# Libraries that are imported only where they are used (pandas, matplotlib, lm-eval and what they bring).
LATER_IMPORTS = 200_000_000
# Positions whose losses are taken at a time, in float32 (lqer/evaluation/perplexity.py).
LOSS_POSITIONS = 256
# A text that is not at hand is taken to be as long as WikiText-2's test split; one that is, to have 4 bytes a token.
ASSUMED_TOKENS = 300_000
BYTES_PER_TOKEN = 4


def estimate(work: Workload) -> list[Stage]:
    """The stages of a run whose store is empty, in order; on a CPU all of a stage's memory is RAM."""
    stages = []
    # What is quantized: a rotated model is a folder of its own, its blocks in float32.
    rotates = work.config.quantize.rotates
    basis = replace(work, streams=True, stored_in_blocks=4) if rotates else work
    if rotates:
        stages.append(_stage("rotate", work, *rotation(work)))
    if work.config.quantize.stream == "original":
        stages.append(_calibrate(basis))
    stages.append(_quantize(basis))
    if work.config.finetune is not None:
        stages.append(_stage("finetune", work, *finetuning(basis)))
    if work.config.evaluation.perplexity is not None or work.config.evaluation.downstream is not None:
        stages.append(_evaluate(work))
    return stages


def _stage(name: str, work: Workload, host: Sequence[Piece], device: Sequence[Piece], disk: Sequence[Piece],
           flops: float, moved: float, calls: float = 0.0) -> Stage:  # fmt: skip
    host = [*host, Piece("libraries", LATER_IMPORTS, sure=False)]
    if not work.on_gpu:
        host, device = [*host, *device], []
    ram, gpu, files = (tuple(piece for piece in pieces if piece.bytes > 0) for pieces in (host, device, disk))
    return Stage(name, ram, gpu, files, flops, moved, calls)


def _calibrate(work: Workload) -> Stage:
    settings = work.config.calibration
    tokens = settings.num_samples * settings.seq_len
    walk = Walk(work, settings.num_samples, settings.seq_len, settings.batch_size)
    host, device, spilled = walk.memory(accumulated=accumulators(work))
    statistics = statistics_bytes(work)
    widest = max(input_sites(work.summary))
    device += [
        Piece("statistics of a block", statistics),
        Piece("products of inputs", 4 * widest**2 if gathers_products(work) else 0, sure=False),
    ]
    disk = [*spilled, Piece("statistics", statistics * work.summary.blocks, OUTPUT_DIR)]
    flops, moved = walk.cost(tokens)
    return _stage("calibrate", work, host, device, disk, flops + observing_flops(work, tokens),
                  moved + observing_bytes(work, tokens))  # fmt: skip


def _quantize(work: Workload) -> Stage:
    settings, summary = work.config.calibration, work.summary
    packed = sum(packed_bytes(work, name, plan) for name, plan in work.plans.items())
    host = [
        Piece("a block as stored", work.stored_block),
        Piece("the packed block", packed // summary.blocks),
    ]
    if not work.streams:
        host = [Piece("the whole model", work.stored * summary.parameters, SAFETENSORS)]
    device = [
        Piece("statistics of a block", statistics_bytes(work)),
        Piece("work on a linear", linear_work(work), sure=False),
    ]
    outside = work.stored * summary.outside_parameters
    disk = [Piece("the quantized model", packed + outside, OUTPUT_DIR)]
    host.append(Piece("what surrounds the blocks", outside if work.streams else 0))
    flops, moved, calls = solving(work)
    if "plain" in work.config.evaluation.baselines:
        disk.append(Piece("the plainly rounded model", packed + outside, OUTPUT_DIR))
    if work.config.quantize.stream == "quantized":
        tokens = settings.num_samples * settings.seq_len
        walk = Walk(work, settings.num_samples, settings.seq_len, settings.batch_size)
        more_host, more_device, spilled = walk.memory(accumulated=accumulators(work), blocks=2)
        host, device, disk = host + more_host, device + more_device, disk + spilled
        walk_flops, walk_moved = walk.cost(2 * tokens)
        flops += walk_flops + observing_flops(work, tokens)
        moved += walk_moved + observing_bytes(work, tokens)
        steps = BlockSteps(work)
        host, device, disk = host + steps.host(), device + steps.device(), disk + steps.disk()
        flops += steps.flops() * (1 + ("plain" in work.config.evaluation.baselines))
    return _stage("quantize", work, host, device, disk, flops, moved, calls)


def _evaluate(work: Workload) -> Stage:
    evaluation, summary = work.config.evaluation, work.summary
    perplexity, downstream = evaluation.perplexity, evaluation.downstream
    lengths = [] if perplexity is None else [_tokens(work.config, place) for place in range(len(perplexity.datasets))]
    batch_tokens, remedy = 0, None
    if perplexity is not None:
        batch_tokens, remedy = perplexity.batch_size * perplexity.seq_len, "evaluation.perplexity.batch_size"
    if downstream is not None and downstream.batch_size * downstream.max_length > batch_tokens:
        batch_tokens, remedy = downstream.batch_size * downstream.max_length, "evaluation.downstream.batch_size"
    seq_len = 0 if perplexity is None else perplexity.seq_len
    walk = Walk(work, -(-max(lengths, default=0) // max(seq_len, 1)), seq_len, 1, batch_tokens, f"a smaller {remedy}")
    host, device, disk = walk.memory()
    if not evaluation.blockwise:
        way = "evaluation.blockwise = true" if downstream is None else 'device_map = "auto", on more GPUs'
        whole = Piece("the whole model", work.computed * summary.parameters, way)
        # It is loaded in RAM before it goes to a GPU.
        host, device, disk = [whole] if work.on_gpu else [], [whole, *walk.activations()], []
    logits = summary.vocabulary * (work.computed * batch_tokens + 8 * min(LOSS_POSITIONS, batch_tokens))
    device.append(Piece("logits of a batch", logits, f"a smaller {remedy}"))
    models = 1 + len(evaluation.baselines)
    flops, moved = walk.cost(models * sum(lengths))
    flops += 2.0 * summary.vocabulary * summary.hidden_size * models * sum(lengths)
    if work.config.quantize.activation != "none":
        quantized = models - ("original" in evaluation.baselines)
        inputs = sum(width for _, width in summary.linears.values())
        moved += float(ROUNDING_PASSES * 4 * inputs * quantized * sum(lengths))
    return _stage("evaluate", work, host, device, disk, flops, moved)


def _tokens(config: Config, place: int) -> int:
    """How many tokens of a dataset are evaluated, as far as that is known without reading it."""
    perplexity = config.evaluation.perplexity
    assert perplexity is not None
    if perplexity.max_windows is not None:
        return perplexity.max_windows * perplexity.seq_len
    path = Path(perplexity.datasets[place].path).expanduser()
    return path.stat().st_size // BYTES_PER_TOKEN if path.is_file() else ASSUMED_TOKENS
