"""The PTX that multiplies lattice codes with many tokens, emulated instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import random_lattice
from ptx import WORD
from ptx_codes import BEGIN, LANE, filled

from lqer.kernels.halves import BLOCK_HALVES
from lqer.kernels.lattice.decode import COPIES
from lqer.kernels.lattice.halves import tile_asm
from lqer.kernels.layout.lattice import pack_lattice, unpack_points

TOKENS = 16384  # of the emulated memory, in bytes


def stored(x_MI: torch.Tensor, columns_JTE: torch.Tensor) -> torch.Tensor:
    """Words of the tokens of a tile, as the documented order has them: [blocks, load, token of a block, t, own]."""
    blocks_BMI = x_MI.view(-1, 8, 128)
    halves = blocks_BMI[:, :, columns_JTE].permute(0, 2, 1, 3, 4).contiguous()
    return halves.view(torch.int32).flatten().to(torch.int64) & WORD


def tokens(blocks: int) -> torch.Tensor:
    return torch.randn(8 * blocks, 128, generator=torch.Generator().manual_seed(blocks)).to(torch.float16)


def check(machine, layout, operands, x_MI, columns_JTE, expected, row_of, groups, blocks) -> None:
    sums = 4 * groups * blocks
    words = stored(x_MI, columns_JTE)
    assert len(words) == blocks * BLOCK_HALVES // 2
    machine.memory[TOKENS // 4 :][: len(words)] = words
    before = torch.arange(32.0 * sums).view(-1, 32)
    operands |= {f"${sums + n}": before[n] for n in range(sums)} | {"%laneid": LANE}
    registers = machine.run(tile_asm(layout.tiles, groups, blocks), operands)
    for n in range(sums):
        group, i, h, e = n // (4 * blocks), n // 4 % blocks, n // 2 % 2, n % 2
        wanted = expected[16 * group + row_of(h), 8 * i + LANE % 4 * 2 + e] + before[n]
        torch.testing.assert_close(registers[f"${n}"].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (2, 2), (1, 8)])
def test_the_instructions_multiply_lattice_codes_exactly(groups, blocks):
    packed = pack_lattice(random_lattice(16 * groups, 128))
    layout, x_MI, machine = packed.layout, tokens(blocks), filled(1)
    assert layout.tiles == 1
    sums, operands = 4 * groups * blocks, {}
    for group in range(groups):
        units = packed.units[group, 0].cpu()[LANE // 4, LANE % 4]
        operands |= {f"${2 * sums + 2 * group + row}": units[:, row] for row in range(2)}
    operands[f"${2 * sums + 2 * groups}"] = TOKENS + 16 * LANE
    operands[f"${2 * sums + 2 * groups + 1}"] = BEGIN + LANE % COPIES * 4
    j, t = torch.arange(4)[:, None, None], torch.arange(4)[:, None]
    columns_JTE = 32 * t + 8 * j + torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    # Points are decoded as four times themselves.
    expected = 4 * unpack_points(packed).cpu().double() @ x_MI.double().T
    check(machine, layout, operands, x_MI, columns_JTE, expected, lambda h: LANE // 4 + 8 * h, groups, blocks)
