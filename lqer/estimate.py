"""What a run from nothing will take: bytes on the device, in RAM and on disk, and floating-point operations, by stage.

With s and r the bytes of a parameter as stored and in the run's dtype, p and o the parameters of a block and of what
surrounds the blocks, W windows of T tokens in batches of B, D the hidden size, V the vocabulary, sites of I features:

    walk         o·r + p·r (two stored blocks beside it in RAM where a GPU's next block is read ahead), hidden states
                 W·T·D·r, activations of a batch, B·T·(D + widest I)·r and a few times more. A model that cannot be
                 read block by block is in memory whole.
    calibrate    a walk; where E[x xᵀ] is gathered 8·I² a site in the making, and 4·I² more for what is written.
                 FLOPs: 2 a weight and token, 4·T·D a token and block for attention, 2·I² a token and site.
    quantize     p·s, the statistics of a block, the packed block, and copies of the largest linear and its solver's.
                 In the quantized stream the calibration's walk, twice, is part of it.
    steps        of whole blocks, part of quantize: a second set of hidden states, a block in float32 and what is learnt
                 of it, 40 bytes a weight; the activations of a micro-batch are kept for its gradient. FLOPs: 6 a weight
                 and token that something is learnt on, 2 for every ratio of AWQ's search.
    evaluate     the whole model in the run's dtype, or under evaluation.blockwise a walk; logits B·T·V·r.
                 FLOPs: as a walk's and 2·V·D a token, for each model.
    disk         statistics, packed blocks by their formats' bits, spilled hidden states and accumulators.

What is stored and held by definition is exact up to small change; working memory is estimated and marked as such.
Linears of one module share a site if they read as many features, but for the last, which reads what the others made.

Not counted: the rotation of a whole model (it is in memory in float32), fine-tuning (two whole models, the gradients of
one), the search of lattice codes, tasks under evaluation.downstream, reading files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lqer.config import Config
from lqer.lowrank.allocation import factor_bits
from lqer.lowrank.krylov import FIRST_STEPS, block_width, largest_space
from lqer.lowrank.solver import SMALL_SIDE
from lqer.methods import METHODS, LinearPlan
from lqer.outline import Outline
from lqer.quantization import requested_statistics, with_spectra
from lqer.rounding import Adaptive
from lqer.transforms import Awq, Lwc

# Guesses: how many other activations of a batch live at once, and copies of the linear that is worked on, of 4 and of
# 8 bytes a weight.
LIVE_ACTIVATIONS = 5
SINGLE_COPIES, DOUBLE_COPIES = 6, 2
# Libraries that are imported only where they are used (pandas, matplotlib, lm-eval and what they bring).
LATER_IMPORTS = 200_000_000
# What elementwise work moves, in passes over its data: roundings (scales, codes, values), norms and gates, statistics.
ROUNDING_PASSES, BLOCK_PASSES, STATISTICS_PASSES = 24, 12, 6
# Float64 eigenvectors, in terms of n³ products of float32; they run far below the rate of products.
EIGEN_COST = 60
# Positions whose losses are taken at a time, in float32 (lqer/evaluation/perplexity.py).
LOSS_POSITIONS = 256
# A text that is not at hand is taken to be as long as WikiText-2's test split; one that is, to have 4 bytes a token.
ASSUMED_TOKENS = 300_000
BYTES_PER_TOKEN = 4
# Bytes a weight that adaptive rounding takes beside it (lqer/rounding/adaptive.py), and learnt clipping, nearly.
LEARNT_BYTES = 40
# Of linears whose rank a budget chooses.
ASSUMED_RANK = 32


@dataclass(frozen=True)
class Workload:
    """A run, as far as its size goes. stored, computed: bytes of a parameter on disk and in the run's dtype.

    streams: whether the model's blocks can be read one at a time.
    """

    config: Config
    outline: Outline
    plans: dict[str, LinearPlan | None]
    stored: int
    computed: int
    on_gpu: bool
    streams: bool


@dataclass(frozen=True)
class Piece:
    """Bytes held at once, and the setting that makes them fewer, as a user would write it; sure unless a guess."""

    what: str
    bytes: int
    remedy: str | None = None
    sure: bool = True


@dataclass(frozen=True)
class Stage:
    """One stage. flops: floating-point operations; moved: bytes that elementwise work reads and writes."""

    name: str
    ram: tuple[Piece, ...]
    device: tuple[Piece, ...]
    disk: tuple[Piece, ...]
    flops: float
    moved: float


def total(pieces: Sequence[Piece], sure: bool = False) -> int:
    """Their bytes; only of those that are sure, where asked."""
    return sum(piece.bytes for piece in pieces if piece.sure or not sure)


def estimate(work: Workload) -> list[Stage]:
    """The stages of a run whose store is empty, in order; on a CPU all of a stage's memory is RAM."""
    stages = [_quantize(work)] if work.config.quantize.stream == "quantized" else [_calibrate(work), _quantize(work)]
    if work.config.evaluation.perplexity is not None or work.config.evaluation.downstream is not None:
        stages.append(_evaluate(work))
    return stages


def input_sites(outline: Outline) -> list[int]:
    """in_features of every input site of one block; see the module's head."""
    first = f"{outline.blocks_name}.0."
    modules: dict[str, list[int]] = {}
    for name, (_, in_features) in outline.linears.items():
        if name.startswith(first):
            modules.setdefault(name.rpartition(".")[0], []).append(in_features)
    return [width for widths in modules.values() for width in (*sorted(set(widths[:-1])), widths[-1])]


def _stage(name: str, work: Workload, host: Sequence[Piece], device: Sequence[Piece], disk: Sequence[Piece],
           flops: float, moved: float) -> Stage:  # fmt: skip
    host = [*host, Piece("libraries", LATER_IMPORTS, sure=False)]
    if not work.on_gpu:
        host, device = [*host, *device], []
    ram, gpu, files = (tuple(piece for piece in pieces if piece.bytes > 0) for pieces in (host, device, disk))
    return Stage(name, ram, gpu, files, flops, moved)


def _calibrate(work: Workload) -> Stage:
    settings = work.config.calibration
    tokens = settings.num_samples * settings.seq_len
    walk = _Walk(work, settings.num_samples, settings.seq_len, settings.batch_size)
    host, device, spilled = walk.memory(accumulated=_accumulators(work))
    statistics = _statistics(work)
    widest = max(input_sites(work.outline))
    device += [
        Piece("statistics of a block", statistics),
        Piece("products of inputs", 4 * widest**2 if _gathers_products(work) else 0, sure=False),
    ]
    disk = [*spilled, Piece("statistics", statistics * work.outline.blocks, OUTPUT_DIR)]
    flops, moved = walk.cost(tokens)
    return _stage("calibrate", work, host, device, disk, flops + _observing_flops(work, tokens),
                  moved + _observing_bytes(work, tokens))  # fmt: skip


def _quantize(work: Workload) -> Stage:
    settings, outline = work.config.calibration, work.outline
    packed = sum(_packed_bytes(work, name, plan) for name, plan in work.plans.items())
    host = [
        Piece("a block as stored", work.stored * outline.block_parameters),
        Piece("the packed block", packed // outline.blocks),
    ]
    if not work.streams:
        host = [Piece("the whole model", work.stored * outline.parameters, SAFETENSORS)]
    device = [
        Piece("statistics of a block", _statistics(work)),
        Piece("work on a linear", _linear_work(work), sure=False),
    ]
    outside = work.stored * outline.outside_parameters
    disk = [Piece("the quantized model", packed + outside, OUTPUT_DIR)]
    host.append(Piece("what surrounds the blocks", outside if work.streams else 0))
    flops, moved = _solving(work)
    if "plain" in work.config.evaluation.baselines:
        disk.append(Piece("the plainly rounded model", packed + outside, OUTPUT_DIR))
    if work.config.quantize.stream == "quantized":
        tokens = settings.num_samples * settings.seq_len
        walk = _Walk(work, settings.num_samples, settings.seq_len, settings.batch_size)
        more_host, more_device, spilled = walk.memory(accumulated=_accumulators(work), blocks=2)
        host, device, disk = host + more_host, device + more_device, disk + spilled
        walk_flops, walk_moved = walk.cost(2 * tokens)
        flops += walk_flops + _observing_flops(work, tokens)
        moved += walk_moved + _observing_bytes(work, tokens)
        steps = _BlockSteps(work)
        host, device = host + steps.host(), device + steps.device()
        flops += steps.flops() * (1 + ("plain" in work.config.evaluation.baselines))
    return _stage("quantize", work, host, device, disk, flops, moved)


def _evaluate(work: Workload) -> Stage:
    evaluation, outline = work.config.evaluation, work.outline
    perplexity, downstream = evaluation.perplexity, evaluation.downstream
    lengths = [] if perplexity is None else [_tokens(work.config, place) for place in range(len(perplexity.datasets))]
    batch_tokens, remedy = 0, None
    if perplexity is not None:
        batch_tokens, remedy = perplexity.batch_size * perplexity.seq_len, "evaluation.perplexity.batch_size"
    if downstream is not None and downstream.batch_size * downstream.max_length > batch_tokens:
        batch_tokens, remedy = downstream.batch_size * downstream.max_length, "evaluation.downstream.batch_size"
    seq_len = 0 if perplexity is None else perplexity.seq_len
    walk = _Walk(work, -(-max(lengths, default=0) // max(seq_len, 1)), seq_len, 1, batch_tokens, f"a smaller {remedy}")
    host, device, disk = walk.memory()
    if not evaluation.blockwise:
        way = "evaluation.blockwise = true" if downstream is None else 'device_map = "auto", on more GPUs'
        whole = Piece("the whole model", work.computed * outline.parameters, way)
        # It is loaded in RAM before it goes to a GPU.
        host, device, disk = [whole] if work.on_gpu else [], [whole, *walk.activations()], []
    logits = outline.vocabulary * (work.computed * batch_tokens + 8 * min(LOSS_POSITIONS, batch_tokens))
    device.append(Piece("logits of a batch", logits, f"a smaller {remedy}"))
    models = 1 + len(evaluation.baselines)
    flops, moved = walk.cost(models * sum(lengths))
    flops += 2.0 * outline.vocabulary * outline.hidden_size * models * sum(lengths)
    if work.config.quantize.activation != "none":
        quantized = models - ("original" in evaluation.baselines)
        inputs = sum(width for _, width in outline.linears.values())
        moved += float(ROUNDING_PASSES * 4 * inputs * quantized * sum(lengths))
    return _stage("evaluate", work, host, device, disk, flops, moved)


OUTPUT_DIR = "output_dir on a larger disk"
MICRO_BATCH = "a smaller quantize.rounding.micro_batch"
SAFETENSORS = "a model in safetensors, which is read block by block"


@dataclass(frozen=True)
class _Walk:
    """Windows on their way through the blocks."""

    work: Workload
    windows: int
    seq_len: int
    batch_size: int
    batch_tokens: int | None = None
    batch_remedy: str = "a smaller calibration.batch_size"

    def memory(self, accumulated: int = 0, blocks: int = 1) -> tuple[list[Piece], list[Piece], list[Piece]]:
        """Host, device and disk. accumulated: bytes of statistics in the making; blocks: how many are held."""
        work, outline = self.work, self.work.outline
        limit = work.config.calibration.max_bytes
        states = self.windows * self.seq_len * outline.hidden_size * work.computed
        # Only what lies in RAM can be spilled.
        spillable = {"hidden states": states, "statistics in the making": 0 if work.on_gpu else accumulated}
        held = sum(spillable.values()) if limit is None else min(sum(spillable.values()), limit)
        what = max(spillable, key=lambda name: spillable[name])
        host = [Piece(what, held, "a smaller calibration.max_memory")]
        disk = [Piece(f"{what}, spilled", sum(spillable.values()) - held, OUTPUT_DIR)]
        device = self.activations()
        if work.streams:
            device.append(Piece("what surrounds the blocks", work.computed * outline.outside_parameters))
            device.append(Piece("a block", blocks * work.computed * outline.block_parameters))
            if work.on_gpu:
                host.append(Piece("two blocks as stored", 2 * work.stored * outline.block_parameters))
        else:
            # It stays in RAM; a block is on the GPU for its visit.
            host.append(Piece("the whole model", work.computed * outline.parameters, SAFETENSORS))
            on_gpu = blocks * outline.block_parameters + outline.outside_parameters
            device.append(Piece("a block and what surrounds them", work.computed * on_gpu if work.on_gpu else 0))
        if work.on_gpu:
            device.append(Piece("statistics in the making", accumulated, 'device = "cpu"'))
        return host, device, disk

    def activations(self) -> list[Piece]:
        """What reaches the widest linear while its block's input is kept, and what else lives at that time."""
        tokens = self.batch_size * self.seq_len if self.batch_tokens is None else self.batch_tokens
        width = self.work.outline.hidden_size + max(input_sites(self.work.outline))
        size = tokens * width * self.work.computed
        others = Piece("other activations of a batch", LIVE_ACTIVATIONS * size, self.batch_remedy, sure=False)
        return [Piece("activations of a batch", size, self.batch_remedy), others]

    def cost(self, tokens: int) -> tuple[float, float]:
        """FLOPs, and bytes moved, of that many tokens through all blocks."""
        outline = self.work.outline
        weights = sum(rows * columns for rows, columns in outline.linears.values())
        attention = 4 * self.seq_len * outline.hidden_size * outline.blocks
        width = outline.hidden_size + max(input_sites(outline))
        moved = BLOCK_PASSES * width * self.work.computed * outline.blocks
        return float(tokens * (2 * weights + attention)), float(tokens * moved)


@dataclass(frozen=True)
class _BlockSteps:
    """What is done to whole blocks before their linears are quantized one by one; nothing, without such parts."""

    work: Workload

    def host(self) -> list[Piece]:
        calibration, outline = self.work.config.calibration, self.work.outline
        states = calibration.num_samples * calibration.seq_len * outline.hidden_size * self.work.computed
        needed = bool(self.work.config.quantize.block_parts)
        return [Piece("hidden states of the original", states * needed, "a smaller calibration.max_memory")]

    def device(self) -> list[Piece]:
        outline, sequences = self.work.outline, self._sequences_learnt_on()
        if not self.work.config.quantize.block_parts:
            return []
        learnt = LEARNT_BYTES * outline.block_parameters if sequences else 0
        width = outline.hidden_size + max(input_sites(outline))
        kept = LIVE_ACTIVATIONS * self._micro_batch() * self.work.config.calibration.seq_len * width * 4
        return [
            Piece("a block in float32", 4 * outline.block_parameters),
            Piece("what is learnt of a block", learnt, sure=False),
            Piece("activations kept for gradients", kept if sequences else 0, MICRO_BATCH, sure=False),
        ]

    def flops(self) -> float:
        settings = self.work.config.calibration
        weights = sum(rows * columns for _, rows, columns, _ in _planned(self.work))
        compared = sum(
            part.ratios * min(part.samples, settings.num_samples)
            for part in self.work.config.quantize.transforms
            if isinstance(part, Awq)
        )
        return float(weights * settings.seq_len) * (2 * compared + 6 * self._sequences_learnt_on())

    def _micro_batch(self) -> int:
        rounding = self.work.config.quantize.rounding
        return (rounding.micro_batch or rounding.batch_size) if isinstance(rounding, Adaptive) else 1

    def _sequences_learnt_on(self) -> int:
        """How many sequences pass a block, forward and backward."""
        quantize, samples = self.work.config.quantize, self.work.config.calibration.num_samples
        sequences = sum(part.epochs * samples for part in quantize.transforms if isinstance(part, Lwc))
        if isinstance(quantize.rounding, Adaptive):
            bits = min(plan.weight.stream_widths["codes"] for _, _, _, plan in _planned(self.work))
            settings = quantize.rounding.settings(bits, None, 0)
            sequences += len(settings.soft_shares) * settings.steps * min(settings.batch_size, samples)
        return sequences


def _gathers_products(work: Workload) -> bool:
    return "autocorrelation" in requested_statistics(work.plans)


def _accumulators(work: Workload) -> int:
    """Statistics in the making: float64, of all sites of a block at once."""
    widths = input_sites(work.outline)
    return sum(12 * width + (8 * width**2 if _gathers_products(work) else 0) for width in widths)


def _statistics(work: Workload) -> int:
    """Bytes of one block's file of statistics."""
    kept = work.config.calibration.error_tokens
    products = _gathers_products(work)
    return sum(
        8 * width + kept * width * work.computed + (4 * width**2 if products else 0)
        for width in input_sites(work.outline)
    )


def _observing_flops(work: Workload, tokens: int) -> float:
    sites = input_sites(work.outline)
    return float(work.outline.blocks * tokens * sum(2 * i**2 for i in sites)) if _gathers_products(work) else 0.0


def _observing_bytes(work: Workload, tokens: int) -> float:
    return float(STATISTICS_PASSES * 4 * tokens * sum(input_sites(work.outline)) * work.outline.blocks)


def _packed_bytes(work: Workload, name: str, plan: LinearPlan | None) -> int:
    out_features, in_features = work.outline.linears[name]
    if plan is None:
        return out_features * in_features * work.stored
    bits = plan.weight.bits_per_value(in_features) * out_features * in_features
    budget = work.config.quantize.low_rank.budget_bits
    if plan.rank is None and budget is not None:
        return int(budget * out_features * in_features / 8)
    rank = min(plan.rank or 0, in_features, out_features)
    return int(bits + factor_bits(plan.factor_formats, plan.factor_axes, in_features, out_features, rank)) // 8


def _planned(work: Workload) -> Iterator[tuple[int, int, int, LinearPlan]]:
    """(block, out_features, in_features, plan) of every linear that is quantized."""
    start = len(work.outline.blocks_name) + 1
    for name, plan in work.plans.items():
        if plan is not None:
            yield int(name[start:].split(".")[0]), *work.outline.linears[name], plan


def _is_iterated(plan: LinearPlan, rank: int, shorter: int) -> bool:
    """Whether lqer/lowrank/solver.py takes krylov."""
    wanted = plan.solver == "krylov" or (plan.solver == "auto" and shorter > SMALL_SIDE)
    return wanted and (2 if plan.solver == "auto" else 1) * largest_space(rank) <= shorter


def _linear_work(work: Workload) -> int:
    """The most that is held beside a block's tensors and statistics while one linear is worked on."""
    sizes = [0]
    for _, out_features, in_features, plan in _planned(work):
        weights, shorter = out_features * in_features, min(out_features, in_features)
        size = (4 * SINGLE_COPIES + 8 * DOUBLE_COPIES) * weights + 3 * 8 * shorter**2
        needs_products = "autocorrelation" in METHODS[plan.method].statistics_for(plan)
        exact = plan.rank is None or (plan.rank > 0 and not _is_iterated(plan, plan.rank, shorter))
        # A factor of R in float64: for error feedback, or for the exact solution under it.
        if needs_products and (exact or plan.rounding.statistics):
            size += 3 * 8 * in_features**2
        sizes.append(size)
    return max(sizes)


def _solving(work: Workload) -> tuple[float, float]:
    """FLOPs and bytes moved of rounding and reconstructing every linear, and of the spectra that are kept of some."""
    kept = work.config.calibration.error_tokens
    drawn = with_spectra(work.outline.blocks)
    repeats = 1 + ("plain" in work.config.evaluation.baselines)
    flops = moved = 0.0
    for block, out_features, in_features, plan in _planned(work):
        weights, shorter = out_features * in_features, min(out_features, in_features)
        rank = ASSUMED_RANK if plan.rank is None else min(plan.rank, shorter)
        full = "autocorrelation" in METHODS[plan.method].statistics and rank > 0
        flops += repeats * 8.0 * kept * weights
        moved += repeats * plan.iterations * ROUNDING_PASSES * 4.0 * weights
        if plan.rounding.statistics:
            flops += repeats * (2.0 * in_features * weights + 2.0 * in_features**3)
        if block in drawn:
            flops += repeats * 2 * (4.0 * shorter * weights + EIGEN_COST * shorter**3)
        if rank > 0 and _is_iterated(plan, rank, shorter):
            product = 4.0 * weights + (2.0 * in_features**2 if full else 0.0)
            flops += plan.iterations * (FIRST_STEPS + 1) * block_width(rank) * product
            # The energy of the error, for the share that is captured.
            flops += 2.0 * in_features * weights if full else 0.0
        elif rank > 0:
            roots = 4.0 * in_features * weights + EIGEN_COST * in_features**3 if full else 0.0
            flops += plan.iterations * (4.0 * shorter * weights + EIGEN_COST * shorter**3 + roots)
        if plan.rank is None:
            flops += 4.0 * shorter * weights + EIGEN_COST * shorter**3
    return flops, moved


def _tokens(config: Config, place: int) -> int:
    """How many tokens of a dataset are evaluated, as far as that is known without reading it."""
    perplexity = config.evaluation.perplexity
    assert perplexity is not None
    if perplexity.max_windows is not None:
        return perplexity.max_windows * perplexity.seq_len
    path = Path(perplexity.datasets[place].path).expanduser()
    return path.stat().st_size // BYTES_PER_TOKEN if path.is_file() else ASSUMED_TOKENS
