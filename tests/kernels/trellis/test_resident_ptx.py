"""The PTX that multiplies codes with tokens held in registers, emulated instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import random_trellis
from ptx import WORD, Machine
from ptx_codes import LANE, loaded_words

from lqer.formats import Trellis
from lqer.kernels.halves import BLOCK_HALVES
from lqer.kernels.layout.trellis import pack_trellis, unpack_values
from lqer.kernels.trellis.byte_sums import token_asm
from lqer.kernels.trellis.resident_ptx import (
    HALVES,
    SPREAD,
    add_asm,
    bytes_asm,
    halves_asm,
    spread_asm,
    start_asm,
    tokens_asm,
)

TOKENS, STEPS = 16384, 8192  # of the emulated memory, in bytes
BY_TILES = pytest.mark.parametrize("tiles", [1, 2])


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32).flatten().to(torch.int64) & WORD


@BY_TILES
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("state_bits", [12, 14, 16])
def test_the_instructions_multiply_four_integer_tokens_exactly(bits, state_bits, tiles):
    weight = random_trellis(Trellis(bits, state_bits, "bytes"), 16, 128 * tiles, scale=128.0)
    packed = pack_trellis(weight)
    x_MI = torch.randint(-32639, 32640, (4, 128 * tiles), generator=torch.Generator().manual_seed(bits))
    x_MI[0] = 32639
    low_MI = (x_MI + 128 & 255) - 128
    steps_MT = 2.0 ** torch.arange(4.0)[:, None] * 2.0 ** -torch.arange(float(tiles))
    operands, place = {"%laneid": LANE}, 2
    for words in loaded_words(packed, 0, tiles):
        operands[f"${place}"], place = words, place + 1
    machine = Machine(1 << 14)
    for tile in range(tiles):
        part = slice(128 * tile, 128 * tile + 128)
        parts = torch.stack([x_MI - low_MI >> 8, low_MI], dim=1)[:, :, part].to(torch.int8)
        machine.memory[TOKENS // 4 :][:256] = words_of(parts)
        machine.memory[STEPS // 4 :][:4] = words_of(steps_MT[:, tile])
        loaded = machine.run(token_asm(), {"$9": TOKENS + LANE // 4 * 128 + LANE % 4 * 16, "$10": STEPS + LANE % 4 * 4})
        spread = machine.run(spread_asm(), {f"${SPREAD + 1 + n}": loaded[f"${n}"] for n in range(9)})
        for n in range(SPREAD + 1):
            operands[f"${place}"], place = spread[f"${n}"], place + 1
    registers = machine.run(bytes_asm(packed.layout, tiles), operands)
    scaled_MI = x_MI.double() * steps_MT.double().repeat_interleave(128, dim=1)
    expected = weight.dequantize().cpu().double() @ scaled_MI.T
    for h in range(2):
        wanted = expected[LANE // 4 * 2 + h, LANE % 4]
        # The sums of two tiles may nearly cancel.
        largest = expected.abs().max().item()
        torch.testing.assert_close(registers[f"${h}"], wanted.to(torch.float32), rtol=1e-6, atol=2.0**-22 * largest)


def random_tokens(tiles: int, blocks: int) -> torch.Tensor:
    return torch.randn(8 * blocks, 128 * tiles, generator=torch.Generator().manual_seed(blocks)).to(torch.float16)


@BY_TILES
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize(("bits", "state_bits"), [(1, 12), (2, 12), (2, 16), (3, 12), (3, 14), (4, 12), (4, 16)])
def test_the_instructions_multiply_tokens_in_float16_exactly(bits, state_bits, tiles, blocks):
    packed = pack_trellis(random_trellis(Trellis(bits, state_bits, "bytes"), 16, 128 * tiles))
    machine, layout, count = Machine(1 << 14), packed.layout, HALVES * blocks
    x_MI = random_tokens(tiles, blocks)
    j, t, own = torch.arange(4)[:, None, None], torch.arange(4)[:, None], torch.arange(8)
    columns_JTE = 64 * (j // 2) + 16 * t + 8 * (j % 2) + own
    blocks_BTI = x_MI.view(blocks, 8, tiles, 128)[..., columns_JTE]  # block, token, tile, load, t, own
    machine.memory[TOKENS // 4 :][: blocks * tiles * BLOCK_HALVES // 2] = words_of(blocks_BTI.permute(0, 2, 3, 1, 4, 5))
    tokens = []
    for tile in range(tiles):
        place = TOKENS + 2 * BLOCK_HALVES * tile + 16 * LANE
        loaded = machine.run(tokens_asm(layout, blocks), {f"${count}": place, f"${count + 1}": torch.ones(32)})
        tokens += [loaded[f"${n}"] for n in range(count)]
    begun = machine.run(start_asm(tiles, blocks), {f"${2 * blocks + n}": x for n, x in enumerate(tokens)})
    chosen = [torch.where(LANE % 4 * 2 + odd == LANE // 4, 0x01010101, 0) for odd in range(2)]
    operands = [*loaded_words(packed, 0, tiles), *tokens, *chosen, *(begun[f"${n}"] for n in range(2 * blocks))]
    named = {f"${4 * blocks + n}": value for n, value in enumerate(operands)} | {"%laneid": LANE}
    registers = machine.run(halves_asm(layout, tiles, blocks), named)
    expected = 128 * unpack_values(packed).cpu().double() @ x_MI.double().T
    for n in range(4 * blocks):
        i, h, e = n // 4, n // 2 % 2, n % 2
        wanted = expected[LANE // 4 * 2 + h, 8 * i + LANE % 4 * 2 + e]
        torch.testing.assert_close(registers[f"${n}"].double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_sums_of_all_warps_are_added():
    machine = Machine(1 << 12)
    sums_WE = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    machine.shared[: sums_WE.numel()] = words_of(sums_WE)
    registers = machine.run(add_asm(16, 256), {"$1": 4 * torch.arange(64)})
    torch.testing.assert_close(registers["$0"], sums_WE.sum(0))
