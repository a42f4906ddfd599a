"""The PTX that decodes lattice codes, run instruction by instruction, and the orders that its results are put in."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_layers import DEVICE
from ptx import Machine, values_of

from lqer.formats import E8P, QuantizedTensor
from lqer.formats.e8 import e8p_points
from lqer.kernels import lattice_decode
from lqer.kernels.lattice import pack_lattice, rows_table
from lqer.kernels.lattice_decode import TABLE_BYTES, decoded_order, token_order, token_tile

CPU = torch.device("cpu")
WORD = (1 << 32) - 1


def filled(begin: int, threads: int = 128) -> tuple[Machine, int]:
    """A machine whose threads have filled the table, in shared memory that begins at `begin`; and where it is."""
    machine = Machine(symbols={"rows_of_a": begin})
    machine.memory[256 : 256 + 512] = rows_table().to(torch.int64) & WORD
    for thread in range(threads):
        special = {"%tid.x": torch.tensor(thread), "%ntid.x": torch.tensor(threads), "$1": torch.tensor(1024)}
        registers = machine.run(lattice_decode.SHARE_TABLE.value, special)
    return machine, int(registers["$0"])


@pytest.mark.parametrize("begin", [0, 0x400, 0x410, 0x7F0, 0x800, 0xC00, 0x3FF0])
def test_an_index_may_be_ored_to_the_table_wherever_shared_memory_begins(begin):
    machine, base = filled(begin)
    assert base % TABLE_BYTES == 0
    assert begin <= base <= begin + TABLE_BYTES
    assert torch.equal(machine.shared[base // 4 : base // 4 + 512], rows_table().to(torch.int64) & WORD)
    assert (machine.shared != 0xDEADBEEF).sum() == 512


@pytest.mark.parametrize(
    ("asm", "dtype"),
    [(lattice_decode.BF16_ASM, torch.bfloat16), (lattice_decode.FP16_ASM, torch.float16)],
    ids=["bf16", "fp16"],
)
def test_the_instructions_decode_every_code_exactly(asm, dtype):
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    parts = {"codes": order.view(512, 128), "scales": torch.ones(1, 1)}
    units = pack_lattice(QuantizedTensor(E8P(2), (512, 1024), 1, parts)).units
    machine, base = filled(0x400)
    registers = machine.run(asm.value, {"$32": units.flatten(), "$33": torch.tensor(base)})
    # [unit, c, j, h] to [unit, c, 4 h + j]
    values = torch.stack([values_of(registers[f"${i}"], dtype) for i in range(32)], -1).view(-1, 4, 4, 2).mT
    natural = values.reshape(32, 8, 16, 4, 4, 8).transpose(1, 2).reshape(512, 128, 8)
    assert torch.equal(natural, e8p_points(CPU)[order].view(512, 128, 8).double())


def test_tokens_are_read_in_the_order_of_memory():
    machine = Machine()
    machine.memory[64:80] = torch.arange(16) * 0x20002 + 0x10000
    registers = machine.run(lattice_decode.TOKENS_ASM.value, {"$32": torch.tensor(256)})
    assert [int(registers[f"${i}"]) for i in range(32)] == list(range(32))


@triton.jit
def put_in_order_kernel(out, weights: tl.constexpr):
    """Value i of unit t of row n stands for 128 n + 32 t + i."""
    first = tl.arange(0, 16)[:, None] * 128 + tl.arange(0, 4)[None, :] * 32
    values = ()
    for i in tl.static_range(32):
        values = values + (first + i,)  # noqa: RUF005
    ordered = decoded_order(values) if weights else token_tile(values)
    tl.store(out + tl.arange(0, 16)[:, None] * 128 + tl.arange(0, 128)[None, :], ordered)


@triton.jit
def token_order_kernel(out):
    columns = tl.arange(0, 256)
    tl.store(out + columns, token_order(columns))


def in_order(weights: bool) -> torch.Tensor:
    out = torch.empty(16, 128, dtype=torch.int32, device=DEVICE)
    put_in_order_kernel[(1,)](out, weights)
    return out.cpu().to(torch.int64)


def test_weights_and_tokens_meet_column_by_column():
    # Value 8 c + 2 j + h of unit t is coordinate 4 h + j of code 4 t + c.
    unit, value = torch.arange(128) // 32, torch.arange(128) % 32
    natural = 8 * (4 * unit + value // 8) + 4 * (value % 2) + value // 2 % 4
    place = torch.empty(256, dtype=torch.int32, device=DEVICE)
    token_order_kernel[(1,)](place)
    columns = torch.empty(256, dtype=torch.int64)
    columns[place.cpu().to(torch.int64)] = torch.arange(256)
    assert torch.equal(columns[128:], columns[:128] + 128)
    weights, tokens = in_order(True), in_order(False)
    assert torch.equal(natural[weights % 128], columns[tokens % 128])
    assert torch.equal(weights // 128, torch.arange(16)[:, None].expand(16, 128))
    # Kernel order, as lattice.py states it.
    j, d, t, e, h = (torch.arange(128) // size % count for size, count in ((32, 4), (16, 2), (4, 4), (2, 2), (1, 2)))
    assert torch.equal(natural[weights[0]], 8 * (4 * t + 2 * d + e) + 4 * h + j)
