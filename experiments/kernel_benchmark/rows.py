"""The plan of the benchmark: scenes, their contenders, and the bars; without torch.

Group letters are those of docs/results/kernels.md; `extra` has no bars. Shapes are K x N.
"""

from __future__ import annotations

from collections.abc import Collection

from kernel_benchmark.results import Bar, Scene

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672))
WIDE = (4096, 11008)  # gate and up of a 7B model
WIDEST = (8192, 28672)  # the same of a 70B model
SQUARE = (8192, 8192)  # q and o of a 70B model
# Tokens, at least, aim: of the time of bf16.
MANY_TOKENS = ((32, 0.65, 0.50), (64, 0.85, 0.60), (128, 1.10, 0.85), (256, 1.25, 1.05), (512, 1.20, 1.05))

GROUPS = {
    "a": "W4A8 with a rank-32 branch, one token, against cuBLAS bf16",
    "b": "W4A16 without a branch against the fastest peers with the same weights",
    "c": "the cost of the rank-32 branch",
    "d": "W4A8 with a rank-32 branch, 16 and 32 tokens",
    "e": "W4A8 with a rank-32 branch, prefill",
    "f": "a whole layer against its emulation",
    "h": "learned codebooks of 2 bits a weight, one token",
    "i": "lattice codes of 2 bits a weight with a rank-64 branch, between Hadamard rotations, one token",
    "j": "trellis codes of 2, 3 and 4 bits a weight as in i, against lattice codes and cuBLAS bf16, up to 16 tokens",
    "k": "integers in groups with 16-bit scales and zero points, of 4, 3 and 2 bits, 1 and 16 tokens",
    "l": "trellis codes whose values are sums of bytes, between rotations, against cuBLAS bf16, five shapes; a branch",
    "m": "INT4 in groups of 128 and W4A16, 32 to 512 tokens, against cuBLAS bf16, two shapes",
    "extra": "other formats, ranks and numbers of tokens",
}


def _everywhere(m: int, against: str) -> tuple[tuple[Scene, str], ...]:
    return tuple((Scene(*shape, m), against) for shape in SHAPES)


def _against_bf16(group: str, shape: tuple[int, int], m: int, at_least: float, aim: float) -> Bar:
    label = f"W4A8 + rank 32, M={m}, {shape[0]}x{shape[1]}"
    return Bar(group, label, "w4a8-r32", ((Scene(*shape, m), "bf16"),), at_least, aim)


def _weight_only(at_1: str, at_16: str, at_least: float | None = None, aim: float | None = None) -> Bar:
    label = "W4A16, no branch, five shapes, M=1 and 16"
    return Bar("b", label, "w4a16", _everywhere(1, at_1) + _everywhere(16, at_16), at_least, aim)


def _branch(activation: str, m: int, rank_32: str, at_least: float | None = 1.20, aim: float | None = 1.06) -> Bar:
    label = f"{'unfused ' if 'unfused' in rank_32 else ''}rank-32 branch, W4{activation.upper()}, M={m}, five shapes"
    return Bar("c", label, rank_32, _everywhere(m, f"w4{activation}"), at_least, aim)


def _codebook(m: int, at_least: float, aim: float) -> Bar:
    label = f"2-bit 2D codebook, M={m}, {SQUARE[0]}x{SQUARE[1]}"
    return Bar("h", label, "vq2-2d", ((Scene(*SQUARE, m), "bf16"),), at_least, aim)


def _lattice(m: int, at_least: float, aim: float) -> Bar:
    label = f"2-bit E8P + rank 64, both Hadamards, M={m}, {SQUARE[0]}x{SQUARE[1]}"
    return Bar("i", label, "e8p-r64", ((Scene(*SQUARE, m), "bf16"),), at_least, aim)


def _trellis(bits: int, m: int, against: str, at_least: float | None = None, aim: float | None = None) -> Bar:
    label = f"{bits}-bit trellis + rank 64, both Hadamards, M={m}, {SQUARE[0]}x{SQUARE[1]}"
    return Bar("j", label, f"trellis{bits}-r64", ((Scene(*SQUARE, m), against),), at_least, aim)


def _integers(bits: int, m: int, against: str, at_least: float | None = None, aim: float | None = None) -> Bar:
    group = 64 if bits == 2 else 128
    label = f"INT{bits} g{group} asymmetric, A16, M={m}, five shapes"
    return Bar("k", label, f"int{bits}-g{group}-a16", _everywhere(m, against), at_least, aim)


def _byte_sums(bits: int, m: int, at_least: float, aim: float) -> Bar:
    label = f"{bits}-bit trellis of byte sums, both Hadamards, M={m}"
    return Bar("l", label, f"bytes{bits}", _everywhere(m, "bf16"), at_least, aim)


def _byte_sums_with_branch(m: int) -> Bar:
    label = f"2-bit trellis of byte sums + rank 64, both Hadamards, M={m}"
    return Bar("l", label, "bytes2-r64", _everywhere(m, "bytes2"))


def _many(ours: str, m: int, at_least: float, aim: float) -> Bar:
    label = f"{'W4A16' if ours == 'w4a16' else 'INT4 g128 asymmetric, A16'}, M={m}, 4096x11008 and 8192x8192"
    return Bar("m", label, ours, tuple((Scene(*shape, m), "bf16") for shape in (WIDE, SQUARE)), at_least, aim)


def _layer(m: int, ours: str, calls: str, at_least: float, aim: float) -> Bar:
    label = f"whole layer W4A8 + rank 32, M={m}, {WIDE[0]}x{WIDE[1]}, {calls}"
    against = ((Scene(*WIDE, m), "emulation-w4a8-r32"),)
    return Bar("f", label, ours, against, at_least, aim, times_faster=True)


BARS = (
    _against_bf16("a", (4096, 11008), 1, 0.60, 0.42),
    _against_bf16("a", (11008, 4096), 1, 0.60, 0.42),
    _against_bf16("a", WIDEST, 1, 0.45, 0.32),
    _weight_only("humming-int4-g16", "humming-int4-g16", 1.25, 0.95),
    # With several rows gemlite multiplies 32 weights by one scale, so groups of 16 give wrong results.
    _weight_only("gemlite-int4-g16", "gemlite-int4-g32", 0.80, 0.50),
    _weight_only("tinygemm-int4-g32", "tinygemm-int4-g32"),
    _weight_only("bf16", "bf16"),
    _branch("a16", 1, "w4a16-r32"),
    _branch("a16", 16, "w4a16-r32"),
    _branch("a8", 1, "w4a8-r32"),
    _branch("a8", 16, "w4a8-r32"),
    _branch("a16", 1, "w4a16-r32-unfused", None, None),
    _against_bf16("d", (8192, 8192), 16, 0.65, 0.45),
    _against_bf16("d", (8192, 8192), 32, 0.65, 0.45),
    _against_bf16("e", WIDE, 2048, 1.30, 1.05),
    _against_bf16("e", WIDE, 8192, 1.20, 1.02),
    _against_bf16("e", WIDEST, 2048, 1.30, 1.05),
    _against_bf16("e", WIDEST, 8192, 1.20, 1.02),
    _layer(1, "w4a8-r32-eager", "both called from Python", 5.0, 40.0),
    _layer(1, "w4a8-r32", "ours in a CUDA graph", 5.0, 40.0),
    _layer(2048, "w4a8-r32-eager", "both called from Python", 1.5, 3.0),
    _codebook(1, 0.45, 0.33),
    _lattice(1, 0.45, 0.33),
    *(_trellis(2, m, "e8p-r64", 1.30, 1.00) for m in (1, 4, 16)),
    *(_trellis(bits, m, "bf16") for m in (1, 4, 16) for bits in (2, 3, 4)),
    _integers(3, 1, "int4-g128-a16", 0.95, 0.85),
    _integers(2, 1, "int4-g128-a16", 0.75, 0.62),
    *(_integers(4, m, against) for m in (1, 16) for against in ("w4a16", "bf16")),
    *(_byte_sums(bits, 1, 0.45, 0.30) for bits in (2, 3, 4)),
    *(_byte_sums(bits, 16, 0.80, 0.60) for bits in (2, 3, 4)),
    *(_byte_sums_with_branch(m) for m in (1, 16)),
    *(_many(ours, *bar) for bar in MANY_TOKENS for ours in ("int4-g128-a16", "w4a16")),
)

_FORMATS = ("w2a16", "w3a16", "w4a16", "w8a16", "int4-g128-a16", "bf16")
_RANKS = tuple(f"w4a8-r{rank}" for rank in (16, 32, 64, 128, 256))
EXTRA = {
    **{Scene(*WIDE, m): (*_FORMATS, "gemlite-int4-g16", "w4a8", *_RANKS) for m in (1, 16)},
    **{Scene(*WIDE, m): ("w4a16", "w4a8-r32", "bf16") for m in (2, 4, 8, 32, 64, 128, 256, 512)},
    **{Scene(*SQUARE, m): ("vq2-1d", "vq2-2d", "vq2-4d", "vq2-2d-r32", "e8p-r64", "bf16") for m in (1, 2, 4, 8, 16)},
}


def scenes_of(groups: Collection[str]) -> dict[Scene, list[str]]:
    """Every scene of the groups in the order of the table, with its contenders, each once."""
    plan: dict[Scene, list[str]] = {}

    def add(scene: Scene, contenders: Collection[str]) -> None:
        listed = plan.setdefault(scene, [])
        listed.extend(name for name in contenders if name not in listed)

    for bar in BARS:
        if bar.group in groups:
            for scene, against in bar.against:
                add(scene, (against, bar.ours))
    if "extra" in groups:
        for scene, contenders in EXTRA.items():
            add(scene, contenders)
    return plan
