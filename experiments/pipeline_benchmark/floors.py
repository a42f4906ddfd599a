"""The floor of each phase: the bytes that it must move and the operations that it must do, at this machine's rates.

A floor counts every byte and operation once: a model that is read once, an artifact that is hashed once. It knows
nothing of the latency of a kernel or a file. Phases whose work depends on a method's own iterations have none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline_benchmark.checkpoint import Shape
from pipeline_benchmark.rates import Rates

# Columns beyond the rank, and products with the error, of the low-rank solver.
OVERSAMPLING, PRODUCTS = 16, 8
# Blocks whose spectra are reported, and spectra of each of their linears.
BLOCKS_WITH_SPECTRA, SPECTRA = 3, 3


@dataclass(frozen=True)
class Work:
    """What a run did. evaluation_tokens: of one of the evaluated `models`. sampled: tokens that output errors are
    measured on. hessian: whether E[x xᵀ] is gathered; feedback: whether rounding uses it. stored: bytes of its
    artifacts; checkpoint: of the quantized one alone. gradient_tokens: those that the loss is differentiated on.
    """

    shape: Shape
    model_bytes: int
    calibration_tokens: int
    evaluation_tokens: int
    sampled: int
    propagates: bool
    hessian: bool
    feedback: bool
    rank: int
    stored: int
    checkpoint: int
    models: int
    gradient_tokens: int = 0

    def of_blocks(self, blocks: int) -> Work:
        """The same of a model with that many blocks; artifacts grow with it."""
        shape = replace(self.shape, blocks=blocks)
        times = shape.weights / self.shape.weights
        sizes = {name: round(times * getattr(self, name)) for name in ("model_bytes", "stored", "checkpoint")}
        return replace(self, shape=shape, **sizes)


@dataclass(frozen=True)
class Floor:
    seconds: float
    of: str


def floors(work: Work, rates: Rates) -> dict[str, Floor]:
    """By phase; a phase without a floor is missing."""
    shape, tokens = work.shape, work.calibration_tokens
    linears = list(shape.linears().values()) * shape.blocks
    weights = sum(out * into for out, into in linears)
    head = shape.vocabulary * shape.hidden
    # q, k and v share one, gate and up another.
    sites = [shape.hidden, shape.hidden, shape.hidden, shape.intermediate] * shape.blocks
    # Statistics that hand on no hidden states need no output of down.
    multiplied = 2 * weights - shape.blocks * shape.hidden * shape.intermediate if work.propagates else weights
    columns = work.rank + OVERSAMPLING
    found = {
        "imports": Floor(rates.imports, "torch and transformers alone"),
        "fingerprint": Floor(work.model_bytes / min(rates.read, rates.hash), "the model read from disk and hashed"),
        "read": Floor(work.model_bytes / rates.reread + work.model_bytes / rates.to_device, "the model, cached"),
        "forward": Floor(
            2 * (multiplied * tokens + weights * work.gradient_tokens) / rates.product,
            f"{'2 x ' * work.propagates}2 FLOP a weight and token{', without down in one' * work.propagates}",
        ),
        "statistics": Floor(sum(sites) * tokens * 2 / rates.copy, "inputs read once"),
        "round": Floor(3 * weights / rates.copy, "weights read, codes written"),
        "errors and spectra": _errors(work, rates, linears),
        "pack": Floor(2 * work.checkpoint / rates.copy + work.checkpoint / rates.to_device, "codes, and to the host"),
        "write": Floor(work.stored / rates.write, "all artifacts"),
        "hash": Floor(work.stored / rates.hash, "all artifacts"),
        "verify": Floor(work.checkpoint / rates.hash, "the checkpoint"),
        "load": _load(work, rates),
        "evaluate": Floor(
            work.models * 2 * (weights + head) * work.evaluation_tokens / rates.product,
            f"{work.models} models, 2 FLOP a weight and token",
        ),
    }
    if work.hessian:
        found["statistics"] = Floor(sum(2 * n * n for n in sites) * tokens / rates.product, "E[x xᵀ], 2 n² FLOP")
    if work.feedback:
        found["factor"] = Floor(sum(2 / 3 * n**3 for n in sites) / rates.product64, "2/3 n³ in float64 a site")
        found["round"] = Floor(sum(out * n * n for out, n in linears) / rates.product32, "out n² FLOP of feedback")
    if work.gradient_tokens:
        found["backward"] = Floor(
            2 * 2 * weights * work.gradient_tokens / rates.product, "forward again and backward, 2 x 2 FLOP"
        )
    if work.rank:
        each = [2 * out * n + (2 * n * n if work.hessian else 0) for out, n in linears]
        found["reconstruct"] = Floor(sum(each) * columns * PRODUCTS / rates.product32, f"{PRODUCTS} thin products")
    return found


def _errors(work: Work, rates: Rates, linears: list[tuple[int, int]]) -> Floor:
    products = sum(4 * out * n * work.sampled for out, n in linears)
    block = work.shape.linears().values()
    # The smaller Gram matrix and its eigenvalues.
    spectra = sum(2 * out * n * min(out, n) + 4 / 3 * min(out, n) ** 3 for out, n in block)
    blocks = min(BLOCKS_WITH_SPECTRA, work.shape.blocks)
    return Floor(
        products / rates.product32 + SPECTRA * blocks * spectra / rates.product64,
        f"two errors on {work.sampled} tokens; {SPECTRA * blocks} spectra a linear",
    )


def _load(work: Work, rates: Rates) -> Floor:
    loaded = (work.models - 1) * work.model_bytes + work.checkpoint
    return Floor(loaded / rates.reread + loaded / rates.to_device, "the evaluated models, cached")
