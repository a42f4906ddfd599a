"""The PTX of Hadamard rotations, emulated instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from ptx import WORD, Machine

from lqer.kernels.rotations.ptx import (
    finish_asm,
    gated_asm,
    leave_asm,
    load_asm,
    rows_asm,
    squares_asm,
    sum_asm,
    weighted_asm,
)
from lqer.transforms.hadamard_factors import two_factors

SIGNS, OTHER, ROWS, ROOM, LARGEST = 1 << 18, 3 << 17, 1 << 19, 1 << 14, 1 << 16  # in bytes
ELEMENTS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32).flatten().to(torch.int64) & WORD


def emulated(x_I, signs_I, rows_AP, element: str, block: int, splits: int, largest: str, norm=None, up_I=None):
    """The values of a program of rows_AP [A, P], each warp's `largest`, as in `finish_asm`, and the sums of squares.

    x_I: the sum of splits [splits, I]. norm: weights [I] and their offset, or None; up_I: what gates x_I, or None.
    """
    together, halves = rows_AP.shape[1], block // 128
    warps, blocks, size = together * halves, x_I.shape[-1] // block, ELEMENTS[element].itemsize
    inputs = element != "f32"
    machine, lane = Machine(1 << 18), torch.arange(32)
    machine.memory[: x_I.numel() * size // 4] = words_of(x_I)
    machine.memory[SIGNS // 4 :][: signs_I.numel() * size // 4] = words_of(signs_I)
    if norm is not None or up_I is not None:
        machine.memory[OTHER // 4 :][: signs_I.numel() * size // 4] = words_of(up_I if norm is None else norm[0])
    machine.memory[ROWS // 4 :][: rows_AP.numel()] = words_of(rows_AP)
    registers, sums = halves * (2 if inputs else 4), 4 * halves * together
    of_token, normed = largest == "token", norm is not None
    outputs = sums + of_token
    for warp in range(warps):
        found = {f"${n}": torch.zeros(32) for n in range(outputs)}
        squares = torch.zeros(32)
        for turn in range(len(rows_AP) // warps):
            number = turn * warps + warp
            first = (min(number, blocks - 1) * block + lane * 4) * size
            places = {f"${registers + s}": first + s * x_I.shape[-1] * size for s in range(splits)}
            x = machine.run(load_asm(halves, element, splits), places)
            operands, summed = [x[f"${n}"] for n in range(registers)], element
            if inputs:
                signs = machine.run(load_asm(halves, element, 1), {f"${registers}": SIGNS + first})
                operands += [signs[f"${n}"] for n in range(registers)]
            if normed:
                given = [squares, *operands[:registers], torch.full((32,), float(number < blocks))]
                given = {f"${1 + n}": value for n, value in enumerate(given)}
                squares = machine.run(squares_asm(halves, element), given)["$0"]
            if normed or up_I is not None:
                other = machine.run(load_asm(halves, element, 1), {f"${registers}": OTHER + first})
                operands += [other[f"${n}"] for n in range(registers)]
                operands += [torch.full((32,), norm[1])] if normed else []
                text = weighted_asm(halves, element) if normed else gated_asm(halves, element)
                made = machine.run(text, {f"${2 * registers + n}": value for n, value in enumerate(operands)})
                operands, summed = [made[f"${n}"] for n in range(2 * registers)], "f32"
            operands = [found[f"${n}"] for n in range(outputs)] + operands
            rows = machine.run(rows_asm(together), {f"${together}": ROWS + 4 * together * number + 0 * lane})
            operands += [rows[f"${n}"] for n in range(together)]
            found = machine.run(
                sum_asm(together, halves, summed, of_token),
                {f"${outputs + n}": value for n, value in enumerate(operands)},
            )
        left = {f"${1 + n}": found[f"${n}"] for n in range(sums)}
        left |= {f"${1 + sums}": ROOM + warp * 512 * warps + lane * 16, f"${2 + sums}": LARGEST + 4 * warp + 0 * lane}
        if of_token:
            left[f"${3 + sums}"] = found[f"${sums}"]
        if normed:
            left[f"${3 + sums + of_token}"] = squares
        machine.run(leave_asm(sums, of_token, normed), left)
    values, magnitudes, totals = [], [], []
    for warp in range(warps):
        first = 4 + (largest != "") + normed
        operands = {f"${first}": ROOM + warp // halves * 512 * halves + lane * 16, "%laneid": lane}
        operands |= {f"${first + 1}": torch.full((32,), 1.0 - 2 * (warp % halves))}
        operands |= {f"${first + 2}": LARGEST + 0 * lane}
        found = machine.run(finish_asm(warps, halves, largest, normed), operands)
        values.append(torch.stack([found[f"${n}"] for n in range(4)], dim=1).flatten())
        magnitudes += [found["$4"]] if largest else []
        totals += [found[f"${first - 1}"]] if normed else []
    return torch.cat(values), [*map(as_floats, magnitudes)], [*map(as_floats, totals)]


def as_floats(register: torch.Tensor) -> torch.Tensor:
    """What was moved as patterns is integers."""
    return register if register.is_floating_point() else register.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    ("element", "splits", "largest"),
    [("bf16", 1, "token"), ("f16", 1, "token"), ("bf16", 1, "tile"), ("f32", 1, ""), ("f32", 3, "")],
)
@pytest.mark.parametrize(
    ("length", "block", "together"), [(1024, 256, 4), (11008, 256, 2), (1536, 128, 4), (1536, 128, 1)]
)
def test_the_instructions_rotate_blocks_as_the_matrix_does(length, block, together, element, splits, largest):
    """Also where O has fewer rows than the warps take turns at: zeros stand for the others."""
    outer_AA, inner_BB = two_factors(length, block)
    assert len(inner_BB) == block
    generator = torch.Generator().manual_seed(length)
    x_SI = torch.randn(splits, length, generator=generator).to(ELEMENTS[element])
    signs_I = torch.randn(length, generator=generator).sign().to(ELEMENTS[element])
    warps = together * block // 128
    padded = torch.zeros(-(-len(outer_AA) // warps) * warps, together)
    padded[: len(outer_AA)] = outer_AA[:together].T * block**-0.5
    x_I = x_SI if splits > 1 else x_SI[0]
    found_T, magnitudes, _ = emulated(x_I, signs_I, padded, element, block, splits, largest)
    signed_I = x_SI.double().sum(0) * (1 if element == "f32" else signs_I.double())
    expected_T = (torch.kron(outer_AA, inner_BB) @ signed_I)[: together * block]
    torch.testing.assert_close(found_T.double(), expected_T, rtol=1e-5, atol=1e-5)
    tiles_NC = found_T.view(-1, 128)
    expected_N = tiles_NC.abs().amax(1) if largest == "tile" else signed_I.abs().max().float().expand(len(tiles_NC))
    assert len(magnitudes) == (len(tiles_NC) if largest else 0)
    for magnitude, expected in zip(magnitudes, expected_N, strict=False):
        assert torch.equal(magnitude, expected.expand(32))


@pytest.mark.parametrize(("element", "largest"), [("bf16", "token"), ("f16", "tile")])
@pytest.mark.parametrize(("length", "block", "together"), [(1024, 256, 4), (11008, 256, 2), (1536, 128, 1)])
def test_the_instructions_gate_a_token(length, block, together, element, largest):
    outer_AA, inner_BB = two_factors(length, block)
    generator = torch.Generator().manual_seed(length)
    x_I, up_I = (torch.randn(length, generator=generator).to(ELEMENTS[element]) for _ in range(2))
    signs_I = torch.randn(length, generator=generator).sign().to(ELEMENTS[element])
    warps = together * block // 128
    padded = torch.zeros(-(-len(outer_AA) // warps) * warps, together)
    padded[: len(outer_AA)] = outer_AA[:together].T * block**-0.5
    found_T, magnitudes, _ = emulated(x_I, signs_I, padded, element, block, 1, largest, up_I=up_I)
    gated_I = torch.nn.functional.silu(x_I.double()) * signs_I.double() * up_I.double()
    expected_T = (torch.kron(outer_AA, inner_BB) @ gated_I)[: together * block]
    torch.testing.assert_close(found_T.double(), expected_T, rtol=1e-5, atol=2e-5)
    if largest == "token":
        torch.testing.assert_close(magnitudes[0], gated_I.abs().max().float().expand(32))


@pytest.mark.parametrize(("element", "largest"), [("bf16", "token"), ("f16", "tile")])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("length", "block", "together"), [(1024, 256, 4), (5120, 256, 4), (1536, 128, 1)])
def test_the_instructions_weight_and_square_a_token_that_is_normed(length, block, together, offset, element, largest):
    """Each value counts once among the squares, also where warps read the last block again."""
    outer_AA, inner_BB = two_factors(length, block)
    generator = torch.Generator().manual_seed(length)
    x_I = torch.randn(length, generator=generator).to(ELEMENTS[element])
    signs_I = torch.randn(length, generator=generator).sign().to(ELEMENTS[element])
    weight_I = torch.randn(length, generator=generator).to(ELEMENTS[element])
    warps = together * block // 128
    padded = torch.zeros(-(-len(outer_AA) // warps) * warps, together)
    padded[: len(outer_AA)] = outer_AA[:together].T * block**-0.5
    found_T, magnitudes, squares = emulated(
        x_I, signs_I, padded, element, block, 1, largest, (weight_I, offset)
    )  # fmt: skip
    weighted_I = x_I.double() * signs_I.double() * (weight_I.double() + offset)
    expected_T = (torch.kron(outer_AA, inner_BB) @ weighted_I)[: together * block]
    torch.testing.assert_close(found_T.double(), expected_T, rtol=1e-5, atol=2e-5)
    if largest == "token":
        torch.testing.assert_close(magnitudes[0], weighted_I.abs().max().float().expand(32))
    for total in squares:
        torch.testing.assert_close(total.double(), x_I.double().square().sum().expand(32), rtol=1e-6, atol=0)
    assert len(squares) == warps
