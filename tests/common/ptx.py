"""An emulator of the PTX instructions that the kernels contain as text; each element of a tensor is a lane.

Semantics are those of NVIDIA's PTX ISA. Registers hold int64 tensors of unsigned values; memory is 32-bit words.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

WORD = (1 << 32) - 1
# Lanes are emulated one instruction after the other, and copies are done at once.
UNEMULATED = ("bar.sync", "cp.async.commit_group", "cp.async.wait_group")


class Machine:
    """Shared and global memory, and the registers of one block of text at a time."""

    def __init__(self, words: int = 1 << 14, symbols: dict[str, int] | None = None):
        self.shared = torch.full((words,), 0xDEADBEEF, dtype=torch.int64)
        self.memory = torch.zeros(words, dtype=torch.int64)
        self.symbols = symbols or {}

    def run(self, text: str, operands: dict[str, Tensor]) -> dict[str, Tensor]:
        """All registers after the text has run; operands: values of "$4" etc. and of special registers."""
        lines = [line.strip() for line in re.sub(r";\s*", ";\n", text).splitlines()]
        lines = [line.rstrip(";") for line in lines if line and line not in "{}" and not line.startswith(".")]
        registers = dict(operands)
        for line in lines:
            opcode, _, rest = line.partition(" ")
            if opcode.startswith("@"):
                assert registers[opcode[1:]].all()
                opcode, _, rest = rest.partition(" ")
            if opcode not in UNEMULATED:
                self._execute(opcode, _split(rest), registers)
        return registers

    def _copy(self, target: Tensor, source: Tensor, size: Tensor, read: Tensor) -> None:
        """Copy `size` bytes of each lane from global to shared memory, of which only `read` are read and not zero."""
        for at in range(0, int(size), 4):
            found = _read(self.memory, source + at)
            self.shared[(target + at) // 4] = torch.where(read > at, found, 0)

    def _execute(self, opcode: str, names: list[str], registers: dict[str, Tensor]) -> None:
        def value(name: str) -> Tensor:
            if name in registers:
                return registers[name]
            if name.startswith("0f"):
                return torch.tensor(int(name[2:], 16))
            number = self.symbols[name] if name in self.symbols else int(name, 0)
            return torch.tensor(number & WORD if number < 0 else number)

        def address(name: str) -> Tensor:
            base, _, offset = name.strip("[]").partition("+")
            return value(base) + int(offset or 0)

        target, sources = names[0], [value(name) for name in names[1:] if "[" not in name and "{" not in name]
        match opcode:
            case "mov.b32" if target.startswith("{"):
                for shift, register in zip((0, 16), _parts(target), strict=True):
                    registers[register] = sources[0] >> shift & 0xFFFF
            case "mov.b32" if names[1].startswith("{"):
                low, high = (value(name) for name in _parts(names[1]))
                registers[target] = low & 0xFFFF | (high & 0xFFFF) << 16
            case "mov.u32" | "mov.b32" | "mov.f32":
                registers[target] = sources[0]
            case "cvt.u32.u16":
                registers[target] = sources[0]
            case "cvt.f32.f16":
                registers[target] = _halves(sources[0], torch.float16)[..., 0].to(torch.float32)
            case "sub.bf16x2" | "sub.f16x2":
                dtype = torch.bfloat16 if "bf16" in opcode else torch.float16
                registers[target] = _on_pairs(lambda a, b: a - b, *sources, dtype=dtype)
            case "cvt.rn.bf16.f32" | "cvt.rn.f16.f32":
                dtype = torch.bfloat16 if "bf16" in opcode else torch.float16
                registers[target] = _float32(sources[0]).to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF
            case "sub.f32":
                registers[target] = _float32(sources[0]) - _float32(sources[1])
            case "add.f32":
                registers[target] = _float32(sources[0]) + _float32(sources[1])
            case "ex2.approx.ftz.f32":
                registers[target] = _float32(sources[0]).exp2()
            case "rcp.approx.ftz.f32":
                registers[target] = 1 / _float32(sources[0])
            case "mul.f32":
                registers[target] = _float32(sources[0]) * _float32(sources[1])
            case "max.NaN.f32":
                registers[target] = torch.maximum(_float32(sources[0]), _float32(sources[1]))
            case "abs.f32":
                registers[target] = _float32(sources[0]).abs()
            case "cvt.f32.bf16":
                registers[target] = _halves(sources[0], torch.bfloat16)[..., 0].to(torch.float32)
            case "redux.sync.max.u32":
                registers[target] = _word(sources[0]).max().expand(len(sources[0]))
            case "shfl.sync.bfly.b32":
                registers[target] = sources[0][torch.arange(len(sources[0])) ^ int(sources[1])]
            case "ld.shared.f32":
                registers[target] = _float32(_read(self.shared, address(names[1])))
            case "add.rn.f32":
                registers[target] = _pattern(_float32(sources[0]) + _float32(sources[1]))
            case "setp.ne.s32":
                registers[target] = sources[0] != sources[1]
            case "or.b32":
                registers[target] = sources[0] | sources[1]
            case "cp.async.cg.shared.global" | "cp.async.ca.shared.global":
                self._copy(address(names[0]), address(names[1]), value(names[2]), value(names[3]))
            case "mov.b64":
                low, high = _parts(target)
                registers[low], registers[high] = sources[0] & WORD, (sources[0] >> 32) & WORD
            case "shl.b32":
                registers[target] = (sources[0] << sources[1]) & WORD
            case "shr.u32" | "shr.b32":
                registers[target] = sources[0] >> sources[1]
            case "shf.r.clamp.b32":
                registers[target] = ((sources[1] << 32 | sources[0]) >> sources[2].clamp(max=32)) & WORD
            case "xor.b32":
                registers[target] = sources[0] ^ sources[1]
            case "and.b32":
                registers[target] = sources[0] & sources[1]
            case "add.u32":
                registers[target] = (sources[0] + sources[1]) & WORD
            case "add.s64":
                registers[target] = sources[0] + sources[1]
            case "mul.lo.u32":
                registers[target] = (sources[0] * sources[1]) & WORD
            case "mul.wide.u32":
                registers[target] = sources[0] * sources[1]
            case "prmt.b32":
                registers[target] = _permuted(*sources)
            case "mul.bf16x2" | "mul.f16x2":
                dtype = torch.bfloat16 if "bf16" in opcode else torch.float16
                registers[target] = _on_pairs(lambda a, b: a * b, *sources, dtype=dtype)
            case "fma.rn.bf16x2":
                registers[target] = _on_pairs(lambda a, b, c: a * b + c, *sources)
            case "fma.rn.f16x2":
                registers[target] = _on_pairs(lambda a, b, c: a * b + c, *sources, dtype=torch.float16)
            case "lop3.b32":
                registers[target] = _lop3(*sources)
            case "ld.shared.b32":
                registers[target] = _read(self.shared, address(names[1]))
            case "ld.shared.v2.b32" | "ld.shared.v4.b32":
                for i, register in enumerate(_parts(target)):
                    registers[register] = _read(self.shared, address(names[1]) + 4 * i)
            case "st.shared.v4.b32":
                for i, register in enumerate(_parts(names[1])):
                    self.shared[address(target) // 4 + i] = _word(registers[register])
            case "st.shared.b32":
                self.shared[address(target) // 4] = _word(value(names[1]))
            case "ld.shared.u16":
                place = address(names[1])
                registers[target] = _read(self.shared, place - place % 4) >> 8 * (place % 4) & 0xFFFF
            case "shfl.sync.idx.b32":
                registers[target] = sources[0][sources[1] % 32]
            case "ld.global.nc.b32" | "ld.global.b32":
                registers[target] = _read(self.memory, address(names[1]))
            case "ld.global.nc.u16":
                place = address(names[1])
                registers[target] = _read(self.memory, place - place % 4) >> 8 * (place % 4) & 0xFFFF
            case "ld.global.v2.b32" | "ld.global.v4.b32":
                for i, register in enumerate(_parts(target)):
                    registers[register] = _read(self.memory, address(names[1]) + 4 * i)
            case "dp4a.s32.s32":
                bytes_of = [[_signed(word >> 8 * i & 255, 8) for i in range(4)] for word in sources[:2]]
                dot = sum(a * b for a, b in zip(*bytes_of, strict=True))
                registers[target] = (dot + sources[2]) & WORD
            case "mad.lo.s32" | "mad.lo.u32":
                registers[target] = (sources[0] * sources[1] + sources[2]) & WORD
            case "cvt.rn.f32.s32":
                registers[target] = _signed(sources[0], 32).to(torch.float32)
            case "fma.rn.f32":
                a, b, c = (_float32(source).double() for source in sources)
                registers[target] = (a * b + c).to(torch.float32)
            case "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32" | "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32":
                a, b, c = ([value(name) for name in _parts(names[i])] for i in (1, 2, 3))
                for register, result in zip(_parts(target), _multiply(a, b, c, ".s32.s8" in opcode), strict=True):
                    registers[register] = result
            case (
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
                | "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
            ):  # fmt: skip
                dtype = torch.bfloat16 if "bf16" in opcode else torch.float16
                a, b, c = ([value(name) for name in _parts(names[i])] for i in (1, 2, 3))
                for register, result in zip(_parts(target), _multiply_halves(a, b, c, dtype), strict=True):
                    registers[register] = result
            case _:
                raise NotImplementedError(opcode)


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _signed(words: Tensor, bits: int) -> Tensor:
    return torch.where(words >= 1 << (bits - 1), words - (1 << bits), words)


def _multiply(a: list[Tensor], b: list[Tensor], c: list[Tensor], signed: bool) -> list[Tensor]:
    """D = A B + C, 16 x 32 bytes, `signed` or not, by 32 x 8 signed ones, of a warp of 32 lanes, 4 g + t."""
    g, t, byte = torch.arange(32) // 4, torch.arange(32) % 4, torch.arange(4)
    a_, b_ = torch.zeros(16, 32, dtype=torch.int64), torch.zeros(32, 8, dtype=torch.int64)
    for i, word in enumerate(a):
        a_[(g + 8 * (i % 2))[:, None], 4 * t[:, None] + byte + 16 * (i // 2)] = word[:, None] >> 8 * byte & 255
    a_ = _signed(a_, 8) if signed else a_
    for i, word in enumerate(b):
        b_[4 * t[:, None] + byte + 16 * i, g[:, None]] = _signed(word[:, None] >> 8 * byte & 255, 8)
    product = a_ @ b_
    return [(product[g + 8 * (i // 2), 2 * t + i % 2] + word) & WORD for i, word in enumerate(c)]


def _multiply_halves(a: list[Tensor], b: list[Tensor], c: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """D = A B + C, 16 x 16 by 16 x 8 numbers of 16 bits, of a warp of 32 lanes, 4 g + t; summed in float64."""
    g, t, half = torch.arange(32) // 4, torch.arange(32) % 4, torch.arange(2)
    a_, b_ = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64)
    for i, word in enumerate(a):
        a_[(g + 8 * (i % 2))[:, None], 2 * t[:, None] + half + 8 * (i // 2)] = _halves(word, dtype)
    for i, word in enumerate(b):
        b_[2 * t[:, None] + half + 8 * i, g[:, None]] = _halves(word, dtype)
    product = a_ @ b_
    return [product[g + 8 * (i // 2), 2 * t + i % 2] + sums for i, sums in enumerate(c)]


def _float32(bits: Tensor) -> Tensor:
    """Numbers of a register: itself, or those whose patterns it holds."""
    return _signed(bits, 32).to(torch.int32).view(torch.float32) if bits.dtype == torch.int64 else bits


def _word(value: Tensor) -> Tensor:
    """What a register holds, as bits."""
    return value if value.dtype == torch.int64 else _pattern(value)


def _pattern(numbers: Tensor) -> Tensor:
    """The patterns of float32 numbers."""
    return numbers.view(torch.int32).to(torch.int64) & WORD


def _halves(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The two numbers of 16 bits in each word [T, 2], the lower one first."""
    pairs = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return _signed(pairs, 16).to(torch.int16).view(dtype).double()


def _split(operands: str) -> list[str]:
    """Operands; those in braces are one."""
    return [found.strip() for found in re.findall(r"\s*\{[^}]*\}|[^,]+", operands) if found.strip()]


def _read(memory: Tensor, address: Tensor) -> Tensor:
    assert not (address % 4).any()
    return memory[address // 4]


def _permuted(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Byte i of the result is the byte of (b, a) that nibble i of the selector names."""
    both = b << 32 | a
    return sum((both >> 8 * (int(selector) >> 4 * i & 7) & 255) << 8 * i for i in range(4))


def _on_pairs(function: Callable[..., Tensor], *words: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A function of two numbers in each word, in float64, rounded once."""
    result = torch.zeros((), dtype=torch.int64)
    for shift in (0, 16):
        values = [_signed(word >> shift & 0xFFFF, 16).to(torch.int16).view(dtype).double() for word in words]
        exact = function(*values)
        result = result | (exact.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF) << shift
    return result


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """Bit i of the result is bit 4 a_i + 2 b_i + c_i of the table."""
    result = torch.zeros_like(a | b | c)
    for chosen in range(8):
        if int(table) >> chosen & 1:
            terms = [x if chosen >> place & 1 else ~x & WORD for x, place in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result
