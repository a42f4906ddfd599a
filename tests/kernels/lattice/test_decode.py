"""The PTX that multiplies lattice codes, emulated instruction by instruction, and the memory order of tokens."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_layers import DEVICE
from ptx import WORD
from ptx_codes import BEGIN, LANE, filled

from lqer.formats import E8P, QuantizedTensor
from lqer.formats.e8 import e8p_points
from lqer.kernels.lattice.decode import COPIES, TABLE_BYTES, product_asm, token_order
from lqer.kernels.layout.lattice import pack_lattice, rows_table

CPU = torch.device("cpu")


@pytest.mark.parametrize("warps", [1, 4, 16])
def test_shared_memory_holds_sixteen_copies_of_the_rows(warps):
    shared = filled(warps).shared[BEGIN // 4 : (BEGIN + TABLE_BYTES) // 4].view(512, COPIES)
    assert torch.equal(shared, (rows_table().to(torch.int64) & WORD)[:, None].expand(512, COPIES))


@triton.jit
def token_order_kernel(out):
    columns = tl.arange(0, 256)
    tl.store(out + columns, token_order(columns))


def kernel_order() -> torch.Tensor:
    """The natural column at each of 128 positions."""
    place = torch.empty(256, dtype=torch.int32, device=DEVICE)
    token_order_kernel[(1,)](place)
    place = place.cpu().to(torch.int64)
    assert torch.equal(place[128:], place[:128] + 128)
    columns = torch.empty(128, dtype=torch.int64)
    columns[place[:128]] = torch.arange(128)
    return columns


def test_tokens_are_in_the_documented_order():
    t, p, o, e, j = (torch.arange(128) // size % count for size, count in ((32, 4), (16, 2), (8, 2), (4, 2), (1, 4)))
    assert torch.equal(kernel_order(), 8 * (4 * t + 2 * p + e) + 2 * j + o)


def test_the_instructions_multiply_every_code_exactly():
    """All 65536 codes, in tiles of 16 rows by 128 columns, with random integers: sums equal those of float64."""
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    parts = {"codes": order.view(512, 128), "scales": torch.ones(1, 1)}
    units = pack_lattice(QuantizedTensor(E8P(2), (512, 1024), 1, parts)).units
    points = e8p_points(CPU)[order].view(32, 16, 8, 128).transpose(1, 2).double()
    machine = filled(16)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-32640, 32640, (4, 128), generator=generator)
    x[0], x[1] = 32639, -32640
    low = (x + 128) % 256 - 128
    digits = torch.stack([(x - low) // 256, low], dim=1)[..., kernel_order()]  # [M, 2, I]
    assert digits.min() >= -128
    assert digits.max() <= 127
    machine.memory[1024 : 1024 + 4 * 64] = digits.to(torch.int8).flatten().view(torch.int32).to(torch.int64) & WORD
    steps = torch.stack([torch.full((4,), 2.0**-5).view(torch.int32), (-120 * x.sum(1)).to(torch.int32)], 1)
    machine.memory[512 : 512 + 2 * 4] = steps.flatten().to(torch.int64) & WORD
    for group in range(32):
        for tile in range(8):
            held, column = units[group, tile].reshape(32, 2), LANE // 4
            operands = {"$2": torch.zeros(32), "$3": torch.zeros(32), "$4": held[:, 0], "$5": held[:, 1]}
            operands |= {"$6": BEGIN + LANE % COPIES * 4, "$8": 2048 + LANE % 4 * 8}
            operands["$7"] = 4096 + column // 2 * 256 + column % 2 * 128 + LANE % 4 * 32
            registers = machine.run(product_asm(), operands)
            expected = points[group, tile] @ x.double().T
            for h in range(2):
                assert torch.equal(registers[f"${h}"], expected[LANE // 4 + 8 * h, LANE % 4].to(torch.float32))
