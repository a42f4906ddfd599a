"""Launch parameters for a layer and a number of tokens, from a table of measurements; nothing is tuned during a call.

`experiments/tune_kernels.py` writes `table.json`, the fastest measured launches of one GPU. There are seven regimes:

    gemv         one token, MXINT4 weights, rounded activations: integer products (integers/gemv.py)
    gemm         few tokens: weights decoded in registers (integers/gemm.py); by code width, N, K and bucket of M
    groups       up to 64 tokens, integer groups: the gemm kernel with a launch from a model (`group_launch`)
    wide         from 17 tokens on, integer groups of four bits: the same by another rule (`wide_launch`)
    stream       33 to 128 tokens, four-bit codes on compute capability 9.0, by a third rule (`stream_launch`)
    tall         129 to 512 tokens, the same codes and cards, by a fourth rule (`tall_launch`)
    dequantize   many tokens, for which the table has no launch: the weight is dequantized, and a library multiplies

A shape that is not in the table uses the launch of the nearest shape, by log N and log K.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lqer.kernels.integers.groups_ptx import slots
from lqer.kernels.layout.codes import ROWS, Layout
from lqer.kernels.layout.groups import GroupLayout

TABLE = Path(__file__).with_name("table.json")
# A bucket holds up to so many tokens; more tokens than in the last one are the dequantize regime.
BUCKETS = (16, 32, 64, 128, 256)
# Strips that a warp of integer groups copies ahead.
STAGES = 3
COST_OF_SPLIT = 1 / 8  # of K of integer groups, for a token, in strips
# The same kernel for 9 to 16 tokens: a program's start and a partial sum of an output, in strips of a program, and how
# much slower a multiprocessor is with fewer programs than the three that fit.
BLOCK_M_OF_16 = 16
START_OF_16, COST_OF_SUM = 0.5, 1 / 350_000
SLOWDOWN_OF_16 = (0.0, 1.6, 1.2, 1.0)
# Four-bit groups and more tokens than 16: by tokens of a program, how many warps and slots of shared memory one of 128
# rows has. Two fit a multiprocessor. Fastest of those timed on an H200, at 32 and 64 tokens and two shapes.
WIDE_ROWS, WIDE_AT_ONCE = 128, 2
WIDE = {32: (4, 6), 64: (4, 3)}
START_OF_WIDE, COST_OF_WIDE_SUM = 2.0, 0.5  # of a program, and of each split, in strips
# gluon/stream_gemm.py, whose programs have 64 rows: by tokens of a program, how many share a multiprocessor. Each has
# so many stages of shared memory. Fastest of those timed on an H200.
STREAM_ROWS, STREAM_STAGES = 64, 3
STREAM = {64: 3, 128: 2}
# What a part of a tile costs for each token of a program, in turns, and the parts whose cost is that of tiles cut
# anywhere. By these the fastest launches of nine shapes and numbers of tokens are taken.
COST_OF_PART, UNEVEN_PARTS = 1 / 128, 6
# gluon/tall_gemm.py, whose programs have 128 rows and a multiprocessor each: tokens of one, and stages of shared
# memory.
TALL_ROWS, TALL_TOKENS_OF_PROGRAM, TALL_STAGES = 128, 256, 3
START_OF_TALL, COST_OF_TALL_SUM = 1.0, 6.0  # of a program, and of a partial sum of each multiprocessor, in turns
MOST_TALL_SPLITS = 8
COLUMNS_OF_TURN = 256  # of both kernels' loops


@dataclass(frozen=True)
class GemmLaunch:
    block_n: int
    block_m: int
    splits: int
    stages: int
    warps: int


@dataclass(frozen=True)
class StreamLaunch:
    """Of gluon/stream_gemm.py, whose programs have 64 rows."""

    block_m: int
    programs: int
    stages: int
    at_once: int  # programs that share a multiprocessor


@dataclass(frozen=True)
class TallLaunch:
    """Of gluon/tall_gemm.py, whose programs have 128 rows."""

    block_m: int
    whole: int  # the output tiles, the first ones, that have one program
    splits: int  # programs of each other tile
    long: int  # turns of the first of them, each 256 columns
    stages: int


@dataclass(frozen=True)
class GemvLaunch:
    block_n: int
    block_t: int  # K tiles at once
    warps: int


@dataclass(frozen=True)
class Entry:
    """A row of the table: the measured shape and its launch (None: dequantize)."""

    n: int
    k: int
    launch: GemmLaunch | GemvLaunch | None


@lru_cache
def read_table(path: Path = TABLE) -> dict[tuple[object, ...], tuple[Entry, ...]]:
    """Entries by ("gemv",) or ("gemm", width, bucket)."""
    table: dict[tuple[object, ...], list[Entry]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["launches"]:
        if row["kernel"] == "gemv":
            table.setdefault(("gemv",), []).append(Entry(row["n"], row["k"], GemvLaunch(**row["launch"])))
        else:
            launch = GemmLaunch(**row["launch"]) if row["launch"] else None
            table.setdefault(("gemm", row["width"], row["m"]), []).append(Entry(row["n"], row["k"], launch))
    return {key: tuple(entries) for key, entries in table.items()}


@lru_cache(maxsize=1024)
def gemv_launch(n: int, k: int) -> GemvLaunch:
    launch = _nearest(("gemv",), n, k)
    assert isinstance(launch, GemvLaunch)
    return launch


@lru_cache(maxsize=4096)
def gemm_launch(width: int, n: int, k: int, bucket: int) -> GemmLaunch | None:
    """The launch for up to `bucket` tokens and codes of `width` bits; None: dequantize."""
    launch = _nearest(("gemm", width, bucket), n, k)
    assert not isinstance(launch, GemvLaunch)
    return launch


@lru_cache(maxsize=4096)
def group_launch(layout: GroupLayout, m: int, multiprocessors: int, together: int = 1) -> GemmLaunch:
    """The launch for m tokens and integer groups, by models of its time that fit five shapes on an H200.

    For up to 8 tokens, 2, 4 or 8 warps share 16 rows and take turns at the strips; for more, a warp has 32 rows, or 16
    if shared memory does not hold two strips of 32, and programs split the strips. `together`: rows whose outputs are
    rounded in one block, which a program must have.
    """
    strips = layout.strips

    def time(launch: GemmLaunch) -> float:
        programs = -(-layout.rows // launch.block_n) * launch.splits * -(-m // launch.block_m)
        sharing = max(1, ROWS * launch.warps // launch.block_n)
        strips_each = -(-strips // (sharing * launch.splits))
        each = -(-programs // multiprocessors)
        if launch.block_m == BLOCK_M_OF_16:
            rounds, rest = divmod(each, len(SLOWDOWN_OF_16) - 1)
            at_once = rounds * (len(SLOWDOWN_OF_16) - 1) + rest * SLOWDOWN_OF_16[rest]
            return at_once * (strips_each + START_OF_16) + COST_OF_SUM * m * layout.rows * launch.splits
        # Row groups that a multiprocessor works on at once, and strips of each.
        at_once = each * launch.block_n * sharing // ROWS
        return at_once * strips_each * _slowdown(at_once) + COST_OF_SPLIT * m * launch.splits

    if m <= 8:
        block_m, every_split = 8, range(1, 2)
        shapes = [(16, 4), (16, 8), (32, 4)] if together <= 32 else [(64, 4), (128, 4)]
    else:
        block_m, every_split = BLOCK_M_OF_16 if m <= BLOCK_M_OF_16 else 32, range(1, strips + 1)
        shapes = [(128, 4), (64, 4)]
    shapes = [shape for shape in shapes if shape[0] % together == 0] or shapes[-1:]
    # Warps with shared memory for one strip do not copy the next one meanwhile.
    held = layout.compiled
    shapes = [(n, warps) for n, warps in shapes if slots(held, n, block_m, warps, STAGES) > 1] or shapes[-1:]
    chosen = shapes if m <= 8 else shapes[:1]
    launches = [GemmLaunch(n, block_m, splits, STAGES, warps) for n, warps in chosen for splits in every_split]
    return min(launches, key=time)


@lru_cache(maxsize=4096)
def wide_launch(layout: GroupLayout, m: int, multiprocessors: int) -> GemmLaunch:
    """The launch for more than 16 tokens and four-bit groups: as many splits as make the waves of programs shortest."""
    block_m = next((size for size in WIDE if m <= size), max(WIDE))
    warps, stages = WIDE[block_m]
    tiles = -(-layout.rows // WIDE_ROWS) * -(-m // block_m)

    def time(splits: int) -> float:
        waves = -(-tiles * splits // (WIDE_AT_ONCE * multiprocessors))
        return waves * (-(-layout.strips // splits) + START_OF_WIDE) + COST_OF_WIDE_SUM * splits

    return GemmLaunch(WIDE_ROWS, block_m, min(range(1, layout.strips + 1), key=time), stages, warps)


@lru_cache(maxsize=4096)
def stream_launch(layout: Layout | GroupLayout, m: int, multiprocessors: int) -> StreamLaunch:
    """The launch of gluon/stream_gemm.py: as many programs as give each tile the same number, or as fit, by a model.

    Tiles are not cut at the same turns where their number and that of programs have no whole ratio: more parts then.
    """
    block_m = next((size for size in STREAM if m <= size), max(STREAM))
    at_once = STREAM[block_m]
    tiles = -(-layout.rows // STREAM_ROWS) * -(-m // block_m)
    turns, fitting = -(-layout.padded_columns // COLUMNS_OF_TURN), at_once * multiprocessors

    def time(programs: int) -> float:
        each = tiles * turns / programs
        uneven = UNEVEN_PARTS if programs % tiles else 0
        return each + COST_OF_PART * block_m * (math.ceil(turns / each) - 1 + uneven)

    even = range(tiles, min(fitting, tiles * turns) + 1, tiles)
    programs = min([*even, min(fitting, tiles * turns)], key=time)
    return StreamLaunch(block_m, programs, STREAM_STAGES, at_once)


@lru_cache(maxsize=4096)
def tall_launch(layout: Layout | GroupLayout, m: int, multiprocessors: int) -> TallLaunch:
    """The launch of gluon/tall_gemm.py: whole waves of tiles, and the rest in parts that take least time by a model.

    A first part has at least as many turns as the others of its tile, and begins before them.
    """
    tiles = -(-layout.rows // TALL_ROWS) * -(-m // TALL_TOKENS_OF_PROGRAM)
    turns = -(-layout.padded_columns // COLUMNS_OF_TURN)
    whole = tiles // multiprocessors * multiprocessors
    rest = tiles - whole

    def time(parts: tuple[int, int]) -> float:
        splits, long = parts
        first = long + START_OF_TALL
        if splits == 1:
            return first
        other = -(-(turns - long) // (splits - 1)) + START_OF_TALL
        # Multiprocessors without a first part take others meanwhile.
        meanwhile = (multiprocessors - rest) * int(first / other)
        waves = -(-max(0, rest * (splits - 1) - meanwhile) // multiprocessors)
        return first + waves * other + COST_OF_TALL_SUM * (splits - 1) * rest / multiprocessors

    every = range(2, min(turns, MOST_TALL_SPLITS) + 1)
    cut = [(splits, long) for splits in every for long in range(-(-turns // splits), turns - splits + 2)]
    splits, long = min([(1, turns), *cut], key=time)
    return TallLaunch(TALL_TOKENS_OF_PROGRAM, tiles if splits == 1 else whole, splits, long, TALL_STAGES)


@lru_cache(maxsize=4096)
def experts_launch(
    layout: Layout | GroupLayout, halves: int, tiles: int, block_m: int, multiprocessors: int
) -> GemmLaunch:
    """The launch of experts, by a rule, not by measurement.

    tiles: of up to block_m pairs of a token and an expert, about; `halves` weights of an expert are multiplied at once.
    """
    rows = halves * layout.rows
    if isinstance(layout, GroupLayout) and block_m == 8:
        # Few programs: the warps of each share 16 rows and take turns at the strips.
        few = tiles * -(-rows // 64) < 4 * multiprocessors
        return GemmLaunch(16 if few else 64, block_m, 1, STAGES, 4)
    if isinstance(layout, GroupLayout):
        warps, steps = 4, layout.strips
        # Warps with shared memory for one strip do not copy the next one meanwhile.
        block_n = 128 if slots(layout.compiled, 128, block_m, warps, STAGES) > 1 else 64
    else:
        block_n, warps, steps = 128, 4 if block_m == 16 else 8, layout.tiles
    splits = max(1, min(steps, 2 * multiprocessors // (tiles * -(-rows // block_n))))
    return GemmLaunch(block_n, block_m, splits, STAGES, warps)


def _slowdown(at_once: int) -> float:
    """Few row groups at once leave a multiprocessor waiting for memory; too many do not all fit."""
    limits = ((4, 1.6), (8, 1.25), (20, 1.0))
    return next((factor for limit, factor in limits if at_once <= limit), 1.35)


def bucket_of(m: int) -> int | None:
    """The bucket of m tokens, None for more than the last."""
    return next((top for top in BUCKETS if m <= top), None)


def _nearest(key: tuple[object, ...], n: int, k: int) -> GemmLaunch | GemvLaunch | None:
    def distance(entry: Entry) -> float:
        return abs(math.log(entry.n / n)) + abs(math.log(entry.k / k))

    return min(read_table()[key], key=distance).launch
