"""The PTX that multiplies trellis codes, emulated instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import random_trellis
from ptx import Machine

from lqer.formats import Trellis
from lqer.kernels.layout.trellis import lookup_table, pack_trellis
from lqer.kernels.trellis.decode import decode_asm, load_asm, product_asm, token_asm

CPU = torch.device("cpu")
WORD = (1 << 32) - 1
BEGIN = 0x400  # of shared memory
LANE = torch.arange(32)


def loaded_words(packed, group: int, span: int) -> list[torch.Tensor]:
    """The words of a warp's lanes, of the first tiles of a row group, as the text of `load_asm` places them."""
    flat = packed.words[group].flatten().cpu().to(torch.int64) & WORD
    at_once = packed.layout.words_at_once
    words = []
    for line in load_asm(span, packed.layout).splitlines():
        first = int(line.rpartition("+")[2].rstrip("];")) // 4 + LANE * at_once
        words += [flat[first + n] for n in range(at_once)]
    return words


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("state_bits", [12, 14, 16])
def test_the_instructions_multiply_every_window_exactly(bits, state_bits, blocks):
    weight = random_trellis(Trellis(bits, state_bits), 32, 256, scale=1.0)
    packed = pack_trellis(weight)
    layout = packed.layout
    table = lookup_table(layout.compiled, CPU).to(torch.int64) & WORD
    assert len(table) == layout.table_words
    machine = Machine(1 << 16, {"global_smem": BEGIN})
    machine.shared[BEGIN // 4 : BEGIN // 4 + len(table)] = table
    tokens = 8 * blocks
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(bits)).to(torch.float16)
    machine.memory[1024 : 1024 + tokens * 64] = x.view(torch.int32).flatten().to(torch.int64) & WORD
    steps = 2.0 ** torch.arange(-tokens // 2, tokens // 2)
    machine.memory[512 : 512 + tokens] = steps.view(torch.int32).to(torch.int64)
    values = weight.dequantize().cpu().double()
    for group in range(2):
        words = loaded_words(packed, group, span=2)
        for tile in range(2):
            held = words[2 * bits * tile : 2 * bits * (tile + 1)]
            decoded = machine.run(
                decode_asm(layout), {f"${32 + n}": word for n, word in enumerate(held)} | {"%laneid": LANE}
            )
            weights = [decoded[f"${n}"] for n in range(32)]
            operands = {f"${i}": torch.zeros(32) for i in range(8 * blocks)}
            operands |= {f"${8 * blocks + n}": value for n, value in enumerate(weights)}
            for i in range(blocks):
                places = {"$18": 4096 + (8 * i + LANE // 4) * 256 + LANE % 4 * 32}
                places |= {f"${19 + e}": 2048 + (8 * i + LANE % 4 * 2 + e) * 4 for e in range(2)}
                loaded = machine.run(token_asm(), places)
                operands |= {f"${8 * blocks + 32 + 18 * i + n}": loaded[f"${n}"] for n in range(18)}
            registers = machine.run(product_asm(blocks), operands)
            rows, columns = slice(16 * group, 16 * group + 16), slice(128 * tile, 128 * tile + 128)
            expected = values[rows, columns] @ x.double().T * steps.double()
            for i in range(blocks):
                for h in range(2):
                    for e in range(2):
                        found = registers[f"${4 * i + 2 * h + e}"]
                        wanted = expected[LANE // 4 * 2 + h, 8 * i + LANE % 4 * 2 + e]
                        torch.testing.assert_close(found, wanted.to(torch.float32), rtol=1e-6, atol=1e-6)
