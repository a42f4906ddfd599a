"""The PTX that multiplies trellis codes of table "bytes", emulated instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import random_trellis
from ptx import WORD, Machine
from ptx_codes import LANE, loaded_words

from lqer.formats import Trellis
from lqer.kernels.byte_sums import tile_asm, token_asm, values_asm
from lqer.kernels.trellis import pack_trellis

# Of the emulated memory, in bytes.
TOKENS, STEPS = 16384, 8192


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("state_bits", [12, 14, 16])
def test_the_instructions_multiply_every_window_exactly(bits, state_bits, groups):
    weight = random_trellis(Trellis(bits, state_bits, "bytes"), 16 * groups, 128, scale=128.0)
    packed = pack_trellis(weight)
    generator = torch.Generator().manual_seed(bits)
    tokens, sums = 4, 2 * groups
    x_MI = torch.randint(-32639, 32640, (tokens, 128), generator=generator)
    x_MI[0] = 32639
    low_MI = (x_MI + 128 & 255) - 128
    parts = torch.stack([x_MI - low_MI >> 8, low_MI], dim=1).to(torch.int8)
    machine = Machine(1 << 14)
    machine.memory[TOKENS // 4 :][: tokens * 64] = parts.view(torch.int32).flatten().to(torch.int64) & WORD
    steps = 2.0 ** torch.arange(-tokens // 2, tokens // 2)
    machine.memory[STEPS // 4 :][:tokens] = steps.view(torch.int32).to(torch.int64)
    before = torch.arange(32.0 * sums).view(-1, 32)
    operands = {f"${sums + n}": before[n] for n in range(sums)} | {"%laneid": LANE}
    for group in range(groups):
        first = 2 * sums + 2 * bits * group
        operands |= {f"${first + n}": word for n, word in enumerate(loaded_words(packed, group))}
    first = 2 * sums + 2 * bits * groups
    loaded = machine.run(token_asm(), {"$9": TOKENS + LANE // 4 * 128 + LANE % 4 * 16, "$10": STEPS + LANE % 4 * 4})
    operands |= {f"${first + n}": loaded[f"${n}"] for n in range(9)}
    registers = machine.run(tile_asm(packed.layout, groups), operands)
    expected = weight.dequantize().cpu().double() @ x_MI.double().T * steps.double()
    for n in range(sums):
        wanted = expected[16 * (n // 2) + LANE // 4 * 2 + n % 2, LANE % 4] + before[n]
        torch.testing.assert_close(registers[f"${n}"], wanted.to(torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("state_bits", [12, 13, 16])
def test_the_instructions_give_every_value(bits, state_bits):
    weight = random_trellis(Trellis(bits, state_bits, "bytes"), 16, 128, scale=128.0)
    packed = pack_trellis(weight)
    operands = {f"${64 + n}": word for n, word in enumerate(loaded_words(packed, 0))} | {"%laneid": LANE}
    registers = Machine(1).run(values_asm(packed.layout), operands)
    values_OI = weight.dequantize().cpu()
    for n in range(64):
        half, h, column = n // 32, n // 16 % 2, n % 16
        found = registers[f"${n}"]
        signed = torch.where(found > WORD // 2, found - WORD - 1, found)
        assert torch.equal(signed.float(), values_OI[LANE // 4 * 2 + h, (half * 4 + LANE % 4) * 16 + column])
