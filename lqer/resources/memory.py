"""Memory and disk that each stage of a run needs, from the shapes of the model and the configuration.

Weights, statistics, hidden states, logits and files follow from their definitions, up to norms and headers; working
memory is estimated, and marked as not certain:

    walk         the weights outside the blocks and one block, the hidden states of all windows, the activations of a
                 batch; if a GPU reads ahead, two blocks in RAM as they are stored, of large blocks a part. A model that
                 cannot be read block by block is in memory whole. Hidden states and statistics on a CPU beyond
                 calibration.max_memory are offloaded to disk; on a GPU sums of experts beyond 18 GB are gathered in
                 further passes, whose results wait there, unless they are used at once (with error propagation). Hidden
                 states of the calibration text are on the GPU where they take little of it
    rotate       the whole model in float32
    token_weights  the inputs of all blocks and the gradients of the windows of a pass
    calibrate    a walk, and the accumulators of a block's statistics
    widths       a calibration, then the inputs of all blocks and the gradients of a few windows, the errors of a block
    quantize     weights as they are read, the statistics of a block, packed blocks, and copies of the linear in work.
                 With error propagation also a walk, with two blocks where the original model runs beside, or stays in
                 RAM; transforms and roundings that learn say what they hold
    finetune     the original and the quantized model, 20 bytes per trained value, the inputs of all blocks, the
                 activations of one and its decoded weights, the logits of a batch
    evaluate     the whole model, or a walk under evaluation.blockwise, and the logits of a batch
    export       the whole model in float32, the checkpoint's and then the exported one, and the logits of both

The estimate is of a run with an empty store. Statistics that are not kept (lqer/resources/statistics.py) are gathered
by the stage that quantizes: it walks, and no stage calibrates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lqer.config import Config
from lqer.evaluation.logits import LOSS_POSITIONS
from lqer.export import Target
from lqer.export.planned import planned_targets
from lqer.export.verify import WINDOW_TOKENS, WINDOWS_OF_LOGITS
from lqer.formats import Passthrough
from lqer.lowrank.rank_allocation import factor_bits
from lqer.methods import LinearPlan
from lqer.resources.backward import LOGIT_COPIES, backward_needs, bytes_of_token_weights, token_weights_needs
from lqer.resources.linear import FACTORIZATION_COPIES, batch_bytes, is_of_expert, linear_bytes, recorded_bytes
from lqer.resources.statistics import gathered, input_sites
from lqer.resources.walk import (
    LARGER_DISK,
    LESS_IN_MEMORY,
    LIVE_ACTIVATIONS,
    SAFETENSORS,
    accumulated_bytes,
    activation_needs,
    add_statistics,
    as_read,
    observed_in_passes,
    states_bytes,
    states_stay_on_gpu,
    statistics_bytes,
    tokens_of_batch,
    walk_needs,
)
from lqer.resources.workload import Need, StageMemory, Workload, total
from lqer.stages.block_work import bytes_of_later_spectra
from lqer.stages.gather_experts import PASS_BYTES
from lqer.stages.measure_widths import WINDOWS
from lqer.stages.width_errors import EXPERT_ROWS, SAMPLED_ROWS
from lqer.statistics import Hessian
from lqer.store.writer import most_waiting
from lqer.training.loss import POSITIONS

HALF = 2  # bytes of a value in half precision
LATER_IMPORTS = 200_000_000  # bytes of libraries that a stage imports (pandas, matplotlib, lm-eval)
STATE_BYTES = 2 * (4 + 4 + 1)  # per weight, of the states of a block under reconstruction: the last one and the next
TRAINED_COPIES = 5  # float32 values per trained one: itself, gradient, Adam's two moments, best so far
LOSS_COPIES = 6  # float32 values for the loss of a position: both models' logits, softmax, products, gradients
DECODED_BYTES = 12  # per weight of a block whose scales are trained: the values, a copy and their gradient in float32
ASSUMED_RANK = 32  # of linears whose rank is chosen under a budget
ASSUMED_TOKENS = 300_000  # of a text that is not local: about the test split of WikiText-2
BYTES_PER_TOKEN = 4  # of a local text


def estimate(work: Workload) -> list[StageMemory]:
    """The stages of a run, in order. On a CPU the memory of the device is RAM."""
    config = work.config
    # A rotated model is stored with its blocks in float32.
    source = (
        replace(work, streams=True, stored_in_blocks=4, read_block=None) if config.quantize.model_transform else work
    )
    stages = []
    if config.quantize.model_transform:
        stages.append(_rotate(work))
    if config.calibration.token_weights == "gradient":
        stages.append(_stage("token_weights", source, *token_weights_needs(source)))
    if source.stores_statistics:
        stages.append(_calibrate(source))
    if config.quantize.widths:
        stages += [_calibrate(source)] if config.quantize.propagates_error else []
        stages.append(_widths(source))
    stages.append(_quantize(source))
    if config.finetune is not None:
        stages.append(_finetune(source))
    if config.evaluation.perplexity is not None or config.evaluation.downstream is not None:
        stages.append(_evaluate(work))
    if targets := planned_targets(config):
        stages.append(_export(work, targets))
    return stages


def _stage(
    name: str, work: Workload, host: Sequence[Need], device: Sequence[Need], disk: Sequence[Need]
) -> StageMemory:
    host = [*host, Need("libraries", LATER_IMPORTS, certain=False)]
    if not work.on_gpu:
        host, device = [*host, *device], []
    ram, gpu, files = (tuple(need for need in needs if need.bytes > 0) for needs in (host, device, disk))
    return StageMemory(name, ram, gpu, files)


def _rotate(work: Workload) -> StageMemory:
    """The memory of rotating the model, which uses a GPU only if that has room."""
    summary = work.summary
    inside = summary.parameters - summary.outside_parameters
    largest = max(rows * columns for rows, columns in summary.linears.values())
    host = [Need("whole model in float32", 4 * summary.parameters)]
    device = [Need("a matrix in float64", FACTORIZATION_COPIES * 8 * largest, certain=False)]
    disk = [Need("rotated model", 4 * inside + work.stored * summary.outside_parameters, LARGER_DISK)]
    return _stage("rotate", work, host, device, disk)


def _calibrate(work: Workload) -> StageMemory:
    statistics = statistics_bytes(work)
    host, device, disk = _calibration_walk(work)
    widest = max(statistic.nbytes(max(input_sites(work.summary))) for statistic in gathered(work.plans))
    # Half-precision products are added to the sums by a kernel on a GPU, others are a matrix of float32 first.
    products = 0 if work.on_gpu and work.computed == HALF else widest // 2
    device.append(Need("statistics of a batch", products, certain=False))
    add_statistics(work, host, device, disk)
    disk.append(Need("statistics", statistics * work.summary.blocks, LARGER_DISK))
    host.append(Need("statistics being written", statistics * (statistics <= most_waiting(work.on_gpu)), certain=False))
    return _stage("calibrate", work, host, device, disk)


def _calibration_walk(work: Workload, blocks: int = 1) -> tuple[list[Need], list[Need], list[Need]]:
    settings = work.config.calibration
    batch, fewer = tokens_of_batch(settings), _smaller("calibration.batch_size")
    accumulated, windows = accumulated_bytes(work), settings.num_samples
    host, device, disk = walk_needs(work, windows, settings.seq_len, batch, fewer, accumulated, blocks, near=True)
    return [*host, Need("weights of the tokens", bytes_of_token_weights(work))], device, disk


def _widths(work: Workload) -> StageMemory:
    """Gradients are taken beside the rounding errors of all formats of a block."""
    summary = work.summary
    host, device, disk = backward_needs(work, min(work.config.calibration.num_samples, WINDOWS))
    errors, optional_rank = [0] * summary.blocks, work.config.quantize.low_rank.optional
    for name, (rows, columns) in summary.linears.items():
        most = EXPERT_ROWS if is_of_expert(name, summary.blocks_name) else SAMPLED_ROWS
        # With and without A and B, which are fitted to all rows.
        errors[_block_of(work, name)] += 2 * rows * columns if optional_rank else min(rows, most) * columns
    add_statistics(work, host, device, disk)
    device += [
        Need("errors of a block", 4 * max(errors) * len(work.config.quantize.widths)),
        Need("work on a linear", _linear_work(work), certain=False),
    ]
    return _stage("widths", work, host, device, disk)


def _quantize(work: Workload) -> StageMemory:
    settings, summary, quantize = work.config.calibration, work.summary, work.config.quantize
    packed = _packed_blocks(work)
    outside = work.stored * summary.outside_parameters
    host = [Need("packed blocks that are written", _being_written(work, max(packed)))]
    if not work.streams:
        host.append(Need("whole model", work.stored * summary.parameters, SAFETENSORS))
    elif not quantize.propagates_error or (work.stored_in_blocks or work.stored) != work.computed:
        host += as_read(work, " to be rounded")  # else what is run is what is quantized
    host.append(Need("weights outside the blocks", outside if work.streams else 0))
    device = [Need("packed block", max(packed))]
    disk = [Need("quantized model", sum(packed) + outside, LARGER_DISK)]
    work_bytes = _linear_work(work)
    if quantize.propagates_error and observed_in_passes(work):
        work_bytes += PASS_BYTES // 2  # of float32, not of float64
    else:
        add_statistics(work, host, device, disk)
    # Quantized linears replace those of a block that was read; of what stays in RAM, or is compared, they make a copy.
    is_copied = quantize.propagates_error and (not work.streams or _original_buffers(work) > 0)
    blocks = 2 if is_copied else 1
    # While a linear is worked on, a GPU holds no sums or activations of the walk, and no quantized copy of the block.
    idle = accumulated_bytes(work) + (blocks - 1) * work.computed * summary.block_parameters
    idle += total(activation_needs(work, tokens_of_batch(settings), ""))
    idle *= work.on_gpu and not work.stores_statistics
    device.append(Need("work on a linear", max(work_bytes - idle, 0), certain=False))
    later = bytes_of_later_spectra(summary.block_parameters) * work.on_gpu
    if later:
        largest = max(rows * columns for rows, columns in summary.linears.values())
        searched = FACTORIZATION_COPIES * 8 * largest
        device.append(Need("matrices until their spectra are found", later, certain=False))
        device.append(Need("the matrix whose spectrum is found", searched, certain=False))
    if len(work.config.evaluation.baselines) > ("original" in work.config.evaluation.baselines):
        disk.append(Need("quantized baseline", sum(packed) + outside, LARGER_DISK))
    if not work.stores_statistics:
        walk = _calibration_walk(work, blocks)
        host, device, disk = ([*a, *b] for a, b in zip((host, device, disk), walk, strict=True))
    if quantize.propagates_error:
        in_ram, on_gpu = _original_stream(work)
        host, device = host + in_ram, device + on_gpu
        learned, states = _whole_block(work)
        device, disk = device + learned, disk + states
    return _stage("quantize", work, host, device, disk)


def _whole_block(work: Workload) -> tuple[list[Need], list[Need]]:
    """Device and disk of the parts that work on whole blocks (`quantize.block_parts`)."""
    quantize, calibration, weights = work.config.quantize, work.config.calibration, work.summary.block_parameters
    if not quantize.block_parts:
        return [], []
    learning = [part for part in (*quantize.transforms, quantize.rounding) if part is not None and part.learning_bytes]
    sequences = max((part.learning_batch for part in learning), default=0)
    activations = LIVE_ACTIVATIONS * sequences * calibration.seq_len * work.widest * 4
    device = [
        Need("block in float32", 4 * weights),
        Need("learned parameters", max((part.learning_bytes for part in learning), default=0) * weights, certain=False),
        Need("activations for gradients", activations, _smaller("quantize.rounding.micro_batch"), certain=False),
    ]
    disk = [Need("states of a block", STATE_BYTES * weights if learning else 0, LARGER_DISK, certain=False)]
    return device, disk


def _original_buffers(work: Workload) -> int:
    """How many times the original model's hidden states are held.

    Statistics of pairs of inputs and token weights need those before and after a block, parts that work on whole blocks
    one of both.
    """
    compared = work.config.calibration.token_weights == "residual"
    compared = compared or any(statistic.needs_original for statistic in gathered(work.plans))
    return 2 if compared else int(bool(work.config.quantize.block_parts))


def _original_stream(work: Workload) -> tuple[list[Need], list[Need]]:
    """Host and device: the original model's hidden states beside the quantized model's."""
    calibration, what = work.config.calibration, "hidden states of the original model"
    states = states_bytes(work, calibration.num_samples, calibration.seq_len)
    held = _original_buffers(work) * states
    stay = states_stay_on_gpu(work, states)
    return ([], [Need(what, held)]) if stay else ([Need(what, held, LESS_IN_MEMORY)], [])


def _finetune(work: Workload) -> StageMemory:
    """The memory of fine-tuning. Both models are on one device, the quantized one in emulation."""
    settings, summary = work.config.finetune, work.summary
    assert settings is not None
    tokens = tokens_of_batch(settings)
    activations = LIVE_ACTIVATIONS * tokens * work.widest * work.computed
    inputs = summary.blocks * tokens * summary.hidden_size * work.computed
    logits = LOGIT_COPIES * work.computed * tokens + 4 * LOSS_COPIES * min(POSITIONS, tokens)
    floats = "floats" in settings.parts
    scales = floats or "scales" in settings.parts
    trained = 0
    for _, rows, columns, plan in _planned(work):
        rank = min(ASSUMED_RANK if plan.rank is None else plan.rank, rows, columns)
        trained += (rows + columns) * ("rht_signs" in settings.parts and plan.transform is not None)
        if "low_rank" in settings.parts:
            trained += (rows + columns) * min(rank, settings.columns)
        elif floats:
            sides = zip(plan.factor_formats, (columns, rows), strict=True)
            trained += rank * sum(side for stored, side in sides if stored.kind == Passthrough.kind)
        if scales:
            trained += plan.weight.trainable_values(rows, columns)
    fewer = _smaller("finetune.batch_size")
    device = [
        Need("original and quantized model", 2 * work.computed * summary.parameters),
        Need("trained parameters", 4 * TRAINED_COPIES * trained),
        Need("inputs of the blocks", inputs, fewer),
        Need("activations for gradients", activations, fewer, certain=False),
        Need("weights decoded for gradients", DECODED_BYTES * summary.block_parameters * scales, certain=False),
        Need("logits of both models", logits * summary.vocabulary, fewer, certain=False),
    ]
    packed = sum(_packed_bytes(work, name, plan) for name, plan in work.plans.items())
    disk = [Need("fine-tuned model", packed + work.stored * summary.outside_parameters, LARGER_DISK)]
    return _stage("finetune", work, [], device, disk)


def _evaluate(work: Workload) -> StageMemory:
    evaluation, summary = work.config.evaluation, work.summary
    perplexity, downstream = evaluation.perplexity, evaluation.downstream
    batch_tokens, key, windows, seq_len = 0, "", 0, 0
    if perplexity is not None:
        seq_len, key = perplexity.seq_len, "evaluation.perplexity.batch_size"
        windows = max(-(-_tokens(work.config, place) // seq_len) for place in range(len(perplexity.datasets)))
        batch_tokens = min(perplexity.batch_size, windows) * seq_len
    if downstream is not None and downstream.batch_size * downstream.max_length > batch_tokens:
        batch_tokens, key = downstream.batch_size * downstream.max_length, "evaluation.downstream.batch_size"
    if evaluation.blockwise:
        host, device, disk = walk_needs(work, windows, seq_len, batch_tokens, _smaller(key))
    else:
        whole = Need("whole model", work.computed * summary.parameters, "Set evaluation.blockwise = true")
        # It is loaded into RAM before it is moved to a GPU.
        host, device, disk = [whole] * work.on_gpu, [whole, *activation_needs(work, batch_tokens, _smaller(key))], []
    # In float32: the logits of some positions, and their softmax; for divergence also those of the unlikely tokens.
    widened = 8 if evaluation.divergence is None else 12
    logits = summary.vocabulary * (work.computed * batch_tokens + widened * min(LOSS_POSITIONS, batch_tokens))
    device.append(Need("logits of a batch", logits, _smaller(key)))
    disk.append(Need("distributions of the original", _distributions(work), _smaller("evaluation.divergence.top_k")))
    return _stage("evaluate", work, host, device, disk)


def _export(work: Workload, targets: Sequence[Target]) -> StageMemory:
    """The models are loaded into RAM before they are moved to a GPU."""
    summary = work.summary
    whole = Need("whole model in float32", 4 * summary.parameters, "Remove export.targets")
    logits = 4 * 2 * WINDOWS_OF_LOGITS * WINDOW_TOKENS * summary.vocabulary
    inside = sum(summary.linears[name][0] * summary.linears[name][1] for name, plan in work.plans.items() if plan)
    others = work.stored * (summary.parameters - inside)
    disk = [
        Need(f"files of {target.kind}", int(target.most_bits * inside) // 8 + others, LARGER_DISK, certain=False)
        for target in targets
    ]
    return _stage("export", work, [whole] * work.on_gpu + [Need("logits of the windows", logits)], [whole], disk)


def _packed_blocks(work: Workload) -> list[int]:
    """Bytes of each packed block."""
    blocks = [0] * work.summary.blocks
    for name, plan in work.plans.items():
        blocks[_block_of(work, name)] += _packed_bytes(work, name, plan)
    return blocks


def _block_of(work: Workload, linear: str) -> int:
    """The index of the block that a linear is in."""
    return int(linear[len(work.summary.blocks_name) + 1 :].split(".")[0])


def _being_written(work: Workload, packed: int) -> int:
    """Bytes of packed blocks that wait for the disk in RAM beside the one in work, see lqer/store/writer.py.

    What comes from a GPU is a copy; a block that is larger than all that may wait is waited for.
    """
    most = most_waiting(work.on_gpu)
    if packed > most:
        return packed * work.on_gpu
    return min(2 * packed, most) if work.on_gpu else packed


def _packed_bytes(work: Workload, name: str, plan: LinearPlan | None) -> int:
    out_features, in_features = work.summary.linears[name]
    if plan is None:
        return out_features * in_features * (work.stored_in_blocks or work.stored)
    budget = work.config.quantize.low_rank.budget_bits
    if plan.rank is None and budget is not None:
        return int(budget * out_features * in_features / 8)
    bits = plan.weight.bits_per_value(in_features) * out_features * in_features
    rank = min(plan.rank or 0, in_features, out_features)
    return int(bits + factor_bits(plan.factor_formats, plan.factor_axes, in_features, out_features, rank)) // 8


def _linear_work(work: Workload) -> int:
    """The most that is held for one linear or a batch of experts, besides tensors and statistics of the block."""
    has_hessian = Hessian() in gathered(work.plans)
    sizes = (linear_bytes(rows, columns, plan, has_hessian) for _, rows, columns, plan in _planned(work))
    of_experts = batch_bytes(work.summary.linears, work.summary.blocks_name, "cuda" if work.on_gpu else "cpu")
    recorded = recorded_bytes((planned[1:] for planned in _planned(work)), has_hessian) if work.on_gpu else 0
    return max(*sizes, of_experts, 0) + recorded


def _planned(work: Workload) -> Iterator[tuple[int, int, int, LinearPlan]]:
    """(block, out_features, in_features, plan) of every linear that is quantized."""
    for name, plan in work.plans.items():
        if plan is not None:
            yield _block_of(work, name), *work.summary.linears[name], plan


def _distributions(work: Workload) -> int:
    """Bytes of the original's most likely tokens on all texts: an id and a logit each, and two sums a position."""
    settings, perplexity = work.config.evaluation.divergence, work.config.evaluation.perplexity
    if settings is None or perplexity is None:
        return 0
    tokens = sum(_tokens(work.config, place) for place in range(len(perplexity.datasets)))
    return tokens * (min(settings.top_k, work.summary.vocabulary) * (4 + work.computed) + 2 * 4)


def _tokens(config: Config, place: int) -> int:
    """How many tokens of a dataset are evaluated, estimated without reading it."""
    perplexity = config.evaluation.perplexity
    assert perplexity is not None
    if perplexity.max_windows is not None:
        return perplexity.max_windows * perplexity.seq_len
    path = Path(perplexity.datasets[place].path).expanduser()
    return path.stat().st_size // BYTES_PER_TOKEN if path.is_file() else ASSUMED_TOKENS


def _smaller(key: str) -> str:
    return f"Reduce {key}"
