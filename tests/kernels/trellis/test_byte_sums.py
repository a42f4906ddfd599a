"""The PTX that decodes trellis codes of table "bytes", emulated instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import random_trellis
from ptx import WORD, Machine
from ptx_codes import LANE, loaded_words

from lqer.formats import Trellis
from lqer.kernels.layout.trellis import pack_trellis
from lqer.kernels.trellis.byte_sums import values_asm


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
