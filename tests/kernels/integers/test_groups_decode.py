"""The PTX that multiplies integer groups, emulated instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from ptx import Machine

from lqer.formats import Int
from lqer.kernels.integers.groups_ptx import (
    SHARED,
    fetch_asm,
    parts_of_strip,
    product_asm,
    ring_bytes,
    slot_bytes,
    slots,
    token_registers,
    tokens_asm,
)
from lqer.kernels.layout.groups import GroupLayout, pack_groups

WORD = (1 << 32) - 1
LANE = torch.arange(32)
STRIPS, SLOT = 2, 1 << 10
COLUMNS = 256 * STRIPS
# In bytes, where the machine's memory holds codes, scales, zero points and tokens.
CODES, SCALES, ZEROS, TOKENS = 0, 1 << 15, 5 << 13, 6 << 13


def store(machine: Machine, at: int, tensor: torch.Tensor) -> None:
    words = tensor.contiguous().view(torch.uint8).flatten().view(torch.int32).to(torch.int64) & WORD
    machine.memory[at // 4 : at // 4 + len(words)] = words


@pytest.mark.parametrize(
    ("rows", "blocks", "dtype"), [(1, 2, torch.bfloat16), (1, 4, torch.bfloat16), (4, 1, torch.float16)], ids=str
)
@pytest.mark.parametrize("group", [32, 64, 128, 256, "row"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_instructions_multiply_all_codes(bits, group, dtype, rows, blocks):
    symmetric, scale_dtype = (bits + rows + blocks) % 2 == 0, "float16" if blocks == 1 else "bfloat16"
    generator = torch.Generator().manual_seed(bits)
    number_format = Int(bits, group, symmetric, scale_dtype)
    weight = number_format.quantize(torch.randn(16 * rows, COLUMNS, generator=generator))
    packed = pack_groups(weight)
    layout = packed.layout
    machine = Machine(1 << 15)
    x_MI = torch.randn(8 * blocks, COLUMNS, generator=generator).to(dtype)
    for at, tensor in ((TOKENS, x_MI), (CODES, packed.words), (SCALES, packed.scales), (ZEROS, packed.zeros)):
        if tensor is not None:
            store(machine, at, tensor[:rows] if tensor is not x_MI else x_MI)
    sums = [torch.zeros(32) for _ in range(4 * rows * blocks)]
    for strip in range(STRIPS):
        unit = strip // layout.strips_per_unit * 8 + LANE // 4
        sources = [CODES + strip * 512 * bits + LANE * 16]
        sources += [SCALES + unit * 4 * layout.groups, ZEROS + unit * 2 * layout.groups]
        slot = torch.full((32,), SLOT)
        operands = {"$1": slot, "$2": torch.ones_like(slot), "%laneid": LANE}
        machine.run(fetch_asm(layout, rows), operands | {f"${3 + n}": place for n, place in enumerate(sources)})
        for part in range(parts_of_strip(blocks)):
            column = strip * 256 + part * 256 // parts_of_strip(blocks) + LANE % 4 * 8
            places = [TOKENS + 2 * ((8 * i + LANE // 4) * COLUMNS + column) for i in range(blocks)]
            tokens = [*places, torch.ones_like(slot)]
            if blocks > 1:
                count = token_registers(blocks)
                found = machine.run(tokens_asm(blocks), {f"${count + i}": place for i, place in enumerate(places)})
                tokens = [found[f"${n}"] for n in range(count)]
            inputs = [*sums, *sums, slot, *tokens, *sources[2:]]
            operands = {f"${n}": value for n, value in enumerate(inputs)} | {"%laneid": LANE}
            text = product_asm(layout, rows, blocks, 0, dtype == torch.bfloat16, part)
            registers = machine.run(text, operands)
            sums = [registers[f"${n}"] for n in range(len(sums))]
    codes, scales = weight.parts["codes"].double(), weight.parts["scales"].double()
    group_I = torch.arange(COLUMNS) // layout.group
    zeros = 0.0 if symmetric else weight.parts["zeros"].double()[:, group_I]
    values_OI = (codes - zeros) * scales[:, group_I]
    expected_OM, magnitude_OM = values_OI @ x_MI.double().T, values_OI.abs() @ x_MI.double().T.abs()
    for n, found in enumerate(sums):
        r, i, h, e = n // (4 * blocks), n // 4 % blocks, n % 4 // 2, n % 2
        row, token = 16 * r + 8 * h + LANE // 4, 8 * i + LANE % 4 * 2 + e
        assert ((found - expected_OM[row, token]).abs() <= 3e-7 * magnitude_OM[row, token]).all()


def test_a_strip_outside_is_not_read():
    layout = GroupLayout(16, 256, 4, 128, False, False)
    machine = Machine(1 << 14)
    machine.memory[:] = WORD
    operands = {"$1": torch.full((32,), SLOT), "$2": torch.zeros(32, dtype=torch.int64), "%laneid": LANE}
    machine.run(fetch_asm(layout, 1), operands | {f"${3 + n}": LANE * 16 for n in range(3)})
    first = SLOT // 4
    assert (machine.shared[first : first + slot_bytes(layout, 1) // 4] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_slots_fit_into_the_memory_that_they_may_take(bits):
    for group in (32, 64, 128, 256, 4096):
        for rows in (1, 2, 4):
            layout = GroupLayout(0, 4096, bits, group, False, False)
            for block_m in (8, 16, 32):
                count = slots(layout, 64 * rows, block_m, 4, 4)
                assert (1 if rows == 1 else 0) <= count <= 4
                assert 4 * count * slot_bytes(layout, rows) <= ring_bytes(64 * rows, block_m, 4) <= SHARED - (8 << 10)
