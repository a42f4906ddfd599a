"""Tokens and outputs that are stored by lanes are those that are stored by tensors, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_layers import DEVICE

from lqer.kernels.rotations.token_stores import (
    load_four,
    store_bytes,
    store_bytes_of_lanes,
    store_four,
    store_halves,
    store_halves_of_lanes,
    store_integers,
    store_integers_of_lanes,
)

TILES, REACH = 3, 64.0
DTYPES = {"bytes": torch.int8, "integers": torch.int8, "halves": torch.float16}
# That are stored: of a tile, or of a token.
STEPS = {"bytes": TILES, "integers": 2 * TILES, "halves": 1}
WARPS_C, REACH_C = tl.constexpr(4), tl.constexpr(REACH)


@triton.jit
def _by_tensors(x, largest, x_out, steps, token, tiles: tl.constexpr, kind: tl.constexpr, lattice: tl.constexpr):
    columns_T = tl.arange(0, WARPS_C * 128)
    x_T = tl.load(x + columns_T)
    tiles_N = tl.arange(0, WARPS_C)
    if kind == "bytes":
        store_bytes(x_T.reshape(WARPS_C, 128), x_out, steps, columns_T.reshape(WARPS_C, 128), tiles_N, tiles)
    elif kind == "integers":
        store_integers(x_T.reshape(WARPS_C, 128), x_out, steps, columns_T.reshape(WARPS_C, 128), tiles_N, tiles)
    else:
        largest_T = tl.zeros_like(x_T) + tl.load(largest)
        store_halves(x_T, largest_T, REACH_C, x_out, steps, token, columns_T, tiles, lattice)


@triton.jit
def _by_lanes(x, largest, x_out, steps, token, tiles: tl.constexpr, kind: tl.constexpr, lattice: tl.constexpr):
    thread_T = tl.arange(0, WARPS_C * 32)
    values = load_four(x + thread_T * 4, thread_T >= 0)
    if kind == "bytes":
        values = values + (tl.load(largest + thread_T // 32),)  # noqa: RUF005
        store_bytes_of_lanes(values, x_out, steps, thread_T, 0, tiles)
    elif kind == "integers":
        values = values + (tl.load(largest + thread_T // 32),)  # noqa: RUF005
        store_integers_of_lanes(values, x_out, steps, thread_T, 0, tiles)
    else:
        values = values + (tl.zeros_like(values[0]) + tl.load(largest),)  # noqa: RUF005
        store_halves_of_lanes(values, REACH_C, x_out, steps, token, thread_T, 0, tiles, lattice)


@triton.jit
def _round_outputs(x, y, count):
    thread_T = tl.arange(0, WARPS_C * 32)
    store_four(y + thread_T * 4, load_four(x + thread_T * 4, thread_T >= 0), thread_T < count // 4)


def random_values() -> torch.Tensor:
    """Of four tiles: usual ones, powers of two next to the largest integer, zeros, and one beyond the last."""
    x_NC = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    x_NC[1] = 2.0 ** torch.randint(-20, 21, (128,), generator=torch.Generator().manual_seed(1))
    x_NC[2] = 0
    return x_NC.to(torch.bfloat16).float().to(DEVICE)


@pytest.mark.parametrize(
    ("kind", "lattice"), [("bytes", False), ("integers", True), ("halves", False), ("halves", True)]
)
def test_lanes_store_the_same_tokens(kind, lattice):
    x_NC = random_values()
    largest = x_NC.abs().max().expand(4).contiguous() if kind == "halves" else x_NC.abs().amax(1)
    found = []
    for kernel in (_by_tensors, _by_lanes):
        x_out = torch.full((16 * TILES * 128,), 77, dtype=DTYPES[kind], device=DEVICE)
        steps = torch.full((8,), 77, dtype=torch.int32 if kind == "integers" else torch.float32, device=DEVICE)
        kernel[(1,)](x_NC, largest, x_out, steps, 5, tiles=TILES, kind=kind, lattice=lattice, num_warps=4)
        found.append((x_out, steps))
    (x_out, steps), (by_lanes, steps_by_lanes) = found
    assert torch.equal(x_out, by_lanes)
    assert torch.equal(steps, steps_by_lanes)
    assert (x_out != 77).sum() >= TILES * 128 * 0.9
    assert (steps != 77).sum() == STEPS[kind]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("kind", ["bytes", "halves"])
def test_the_step_of_values_that_are_not_finite_is_not_finite(kind, value):
    x_NC = random_values()
    x_NC[0, 7] = value
    largest = torch.tensor([abs(value), 1.0, 1.0, 1.0], device=DEVICE)
    x_out = torch.zeros(16 * TILES * 128, dtype=DTYPES[kind], device=DEVICE)
    steps = torch.zeros(8, device=DEVICE)
    _by_lanes[(1,)](x_NC, largest, x_out, steps, 5, tiles=TILES, kind=kind, lattice=False, num_warps=4)
    assert steps.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_four_outputs_are_stored_next_to_each_other_and_none_beyond_the_last(dtype):
    # Of 8 bits, which no conversion rounds: Triton's interpreter cuts others.
    x_T = torch.randn(512, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).float().to(DEVICE)
    y_T = torch.full((512,), 77, dtype=dtype, device=DEVICE)
    _round_outputs[(1,)](x_T, y_T, 384, num_warps=4)
    assert torch.equal(y_T[:384], x_T[:384].to(dtype))
    assert (y_T[384:] == 77).all()
