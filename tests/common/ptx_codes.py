"""What emulated lanes have before they multiply: words of trellis codes, and the table of lattice codes."""

from __future__ import annotations

import torch
from ptx import WORD, Machine
from torch import Tensor

from lqer.kernels.lattice.decode import share_asm
from lqer.kernels.layout.lattice import rows_table
from lqer.kernels.layout.trellis import PackedTrellis
from lqer.kernels.trellis.decode import load_asm

LANE = torch.arange(32)
BEGIN = 0x410  # of the table, in shared memory


def loaded_words(packed: PackedTrellis, group: int, tiles: int = 1) -> list[Tensor]:
    """The words of a warp's lanes, of the first tiles of a row group, as the text of `load_asm` places them."""
    flat = packed.words[group].flatten().cpu().to(torch.int64) & WORD
    at_once = packed.layout.words_at_once
    words = []
    for line in load_asm(tiles, packed.layout).splitlines():
        first = int(line.rpartition("+")[2].rstrip("];")) // 4 + LANE * at_once
        words += [flat[first + n] for n in range(at_once)]
    return words


def filled(warps: int) -> Machine:
    """A machine after its threads have filled the table of lattice codes."""
    machine = Machine(symbols={"rows_of_a": BEGIN})
    machine.memory[256 : 256 + 512] = rows_table().to(torch.int64) & WORD
    threads = torch.arange(32 * warps)
    registers = machine.run(share_asm(warps), {"%tid.x": threads, "$1": torch.tensor(1024)})
    assert int(registers["$0"]) == BEGIN
    return machine
