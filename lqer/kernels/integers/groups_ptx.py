"""PTX that decodes integer groups and multiplies them with tokens, in registers (layout/groups.py).

Every thread copies its codes and scales to shared memory some strips ahead, and reads only what it has copied itself,
so warps never wait for each other. Of a floating-point number whose leading mantissa bits are a code u of b bits, and
whose exponent is b, the value is 2^b + u: a shift and a `lop3` make two of them, and one subtraction of 2^b + z two
exact integers u - z. The high digit of an 8-bit code is one more such number, with an exponent that makes it 16 times
as large. The sum over a group is multiplied by its scale; float32 sums are all that is rounded.

The functions are evaluated when a kernel is compiled, and are part of its key in Triton's cache.
"""

import triton

from lqer.kernels.layout.groups import LANES, STRIP, GroupLayout, places

STEPS = STRIP // 32  # of a strip; two tensor core instructions each
# By whether it is bfloat16, else float16: mantissa bits, exponent bias, name in PTX.
FLOATS = {False: (10, 15, "f16"), True: (7, 127, "bf16")}
# Bytes of shared memory of a program: more would have to be asked for, and Triton asks only for its own part.
SHARED = 48 << 10
ALIGNMENT = 1 << 10


@triton.constexpr_function
def one_number(bits: int, digit: int, bfloat: bool) -> int:
    """Pattern of two numbers 2^b whose leading mantissa bits take a digit that starts at bit `digit` of a code."""
    mantissa, bias, _ = FLOATS[bfloat]
    return (bias + min(bits, 4) + digit << mantissa) * 0x10001


@triton.constexpr_function
def pair_asm(bits: int, pair: int, words: list[str], targets: list[str], bfloat: bool) -> list[str]:
    """PTX: targets = two codes, as floating-point numbers that exceed them; one number for each digit of 8 bits."""
    mantissa, width = FLOATS[bfloat][0], min(bits, 4)
    lines = []
    for target, digit in zip(targets, range(0, bits, width), strict=True):
        rest = f"0x{one_number(bits, digit, bfloat):08X}"
        for place in places(bits, pair):
            if not digit <= place.shift < digit + width:
                continue
            to = mantissa - width + place.shift - digit
            source, away = words[place.word], place.bit - to
            if away:
                lines.append(f"{'shr' if away > 0 else 'shl'}.b32 t, {source}, {abs(away)};")
                source = "t"
            mask = (1 << place.width) - 1 << to
            # (source & mask) | rest
            lines.append(f"lop3.b32 {target}, {source}, 0x{mask * 0x10001:08X}, {rest}, 0xEA;")
            rest = target
    return lines


@triton.constexpr_function
def zero_asm(layout: GroupLayout, group: int, h: int, zeros: list[str], targets: list[str], bfloat: bool) -> list[str]:
    """PTX: targets = what is subtracted from both numbers of `pair_asm`, for row g + 8 h; one for each digit."""
    mantissa, width = FLOATS[bfloat][0], min(layout.bits, 4)
    lines = []
    for target, digit in zip(targets, range(0, layout.bits, width), strict=True):
        number, up = one_number(layout.bits, digit, bfloat), mantissa - width - digit
        mask = (1 << width) - 1 << digit
        if layout.symmetric:
            bits = (layout.offset & mask) << up if up >= 0 else (layout.offset & mask) >> -up
            lines.append(f"mov.b32 {target}, 0x{number | bits * 0x10001:08X};")
            continue
        word, byte = divmod(2 * group + h, 4)
        lines.append(f"prmt.b32 t, {zeros[word]}, 0, 0x4{byte}4{byte};")
        lines += [f"and.b32 t, t, 0x{mask * 0x10001:08X};"] if layout.bits == 8 else []
        lines.append(f"{'shl' if up >= 0 else 'shr'}.b32 t, t, {abs(up)};")
        lines.append(f"or.b32 {target}, t, 0x{number:08X};")
    return lines


@triton.constexpr_function
def scale_asm(layout: GroupLayout, source: str, targets: list[str]) -> list[str]:
    """PTX: targets = the scales of rows g and g + 8, float32."""
    if layout.bfloat:
        lines = [f"shl.b32 t, {source}, 16;", f"mov.b32 {targets[0]}, t;"]
        return [*lines, f"and.b32 t, {source}, 0xFFFF0000;", f"mov.b32 {targets[1]}, t;"]
    lines = [f"mov.b32 {{low, high}}, {source};"]
    return [*lines, *(f"cvt.f32.f16 {target}, {half};" for target, half in zip(targets, ("low", "high"), strict=True))]


@triton.constexpr_function
def slot_places(layout: GroupLayout, rows: int) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Where the parts of a warp's strips of `rows` row groups lie in its slot of shared memory.

    (tensor, row group, number of the part) -> (offset of lane 0, bytes of a lane, which are those between lanes).
    """
    parts = [("words", 16, layout.bits)]
    for name, size in (("scales", 4 * layout.groups), ("zeros", 2 * layout.groups)):
        # The zero points of a single group are too few bytes for a copy; they are read where they are used.
        if name == "scales" or not (layout.symmetric or layout.groups == 1):
            parts.append((name, min(size, 16), max(1, size // 16)))
    found, at = {}, 0
    for r in range(rows):
        for name, size, count in parts:
            for n in range(count):
                found[name, r, n] = at, size
                at += size * LANES
    return found


@triton.constexpr_function
def reads_zeros(layout: GroupLayout) -> bool:
    """Whether zero points are read where they are used."""
    return layout.groups == 1 and not layout.symmetric


@triton.constexpr_function
def slot_bytes(layout: GroupLayout, rows: int) -> int:
    """Bytes of a warp's slot."""
    return LANES * sum(size for _, size in slot_places(layout, rows).values())


@triton.constexpr_function
def ring_bytes(block_n: int, block_m: int, warps: int) -> int:
    """What Triton leaves of the shared memory: warps exchange a tile of float32 sums of at most 128 rows through it."""
    return SHARED - max(8 << 10, 4 * block_m * min(128, max(block_n, 16 * warps)))


@triton.constexpr_function
def slots(layout: GroupLayout, block_n: int, block_m: int, warps: int, stages: int) -> int:
    """Slots of a warp: `stages`, or fewer if shared memory is too small; 0 if not even one fits."""
    slot = slot_bytes(layout, max(1, block_n // (16 * warps)))
    return min(stages, ring_bytes(block_n, block_m, warps) // (warps * slot))


@triton.constexpr_function
def row_group_bytes(layout: GroupLayout) -> dict[str, int]:
    """Bytes of a row group in each tensor."""
    scales = layout.units * 32 * layout.groups
    return {"words": layout.strips * layout.bits * 16 * LANES, "scales": scales, "zeros": scales // 2}


@triton.constexpr_function
def reserve_asm(size: int) -> str:
    """PTX: $0 = the address of so many bytes of shared memory.

    What Triton reserves follows: its operands of tensor cores must start at a multiple of ALIGNMENT there.
    """
    whole = -(-size // ALIGNMENT) * ALIGNMENT
    return f"{{.shared .align {ALIGNMENT} .b8 slots[{whole}]; mov.u32 $0, slots;}}"


@triton.constexpr_function
def lane_asm(slot: str) -> list[str]:
    """PTX: at4, at8 and at16 = a lane's part of the slot, for parts of so many bytes."""
    lines = [".reg .b32 lane, at4, at8, at16;", "mov.u32 lane, %laneid;"]
    return [*lines, *(f"mad.lo.u32 at{size}, lane, {size}, {slot};" for size in (4, 8, 16))]


@triton.constexpr_function
def fetch_asm(layout: GroupLayout, rows: int) -> str:
    """PTX: copy a lane's part of a strip to its slot $1; from $3, $4 and $5: codes, scales, zero points.

    $2: 1, or 0 to copy nothing and fill the slot with zeros. $0 = $1, to have an output.
    """
    strides, sources = row_group_bytes(layout), {"words": "$3", "scales": "$4", "zeros": "$5"}
    lines = [*lane_asm("$1"), ".reg .b32 read4, read8, read16;"]
    lines += [f"shl.b32 read{1 << n}, $2, {n};" for n in (2, 3, 4)]
    for part, place in slot_places(layout, rows).items():
        name, r, n = part
        at, size = place
        level = "cg" if size == 16 else "ca"
        # Parts of codes lie side by side for all lanes, parts of scales for each.
        source = f"{sources[name]}+{r * strides[name] + n * (16 * LANES if name == 'words' else 16)}"
        lines.append(f"cp.async.{level}.shared.global [at{size}+{at}], [{source}], {size}, read{size};")
    return "{\n" + "\n".join([*lines, "cp.async.commit_group;", "mov.b32 $0, $1;"]) + "\n}"


@triton.constexpr_function
def load_asm(name: str, n: int, place: tuple[int, int]) -> str:
    """PTX: {name}(4 n), {name}(4 n + 1), ... = the words of part number n."""
    at, size = place
    registers = ", ".join(f"{name}{n * 4 + i}" for i in range(size // 4))
    vector = f".v{size // 4}.b32 {{{registers}}}" if size > 4 else f".b32 {registers}"
    return f"ld.shared{vector}, [at{size}+{at}];"


@triton.constexpr_function
def parts_of_strip(blocks: int) -> int:
    """Parts that the product of a strip with 8 `blocks` tokens is divided into, each with as many registers of x."""
    return min(blocks, STEPS)


@triton.constexpr_function
def token_registers(blocks: int) -> int:
    """Registers of x of a part."""
    return 4 * blocks * STEPS // parts_of_strip(blocks)


@triton.constexpr_function
def tokens_asm(blocks: int) -> str:
    """PTX: outputs = a part's columns of 8 `blocks` tokens, by step and block; inputs: the address of each block."""
    count = token_registers(blocks)
    lines = []
    for n in range(0, count, 4):
        step, i = divmod(n // 4, blocks)
        lines.append(f"ld.global.v4.b32 {{${n}, ${n + 1}, ${n + 2}, ${n + 3}}}, [${count + i}+{64 * step}];")
    return "\n".join(lines)


@triton.constexpr_function
def tokens_constraints(blocks: int) -> str:
    return ",".join(["=&r"] * token_registers(blocks) + ["l"] * blocks)


@triton.constexpr_function
def product_asm(layout: GroupLayout, rows: int, blocks: int, ahead: int, bfloat: bool, part: int = 0) -> str:
    """PTX: add the product of a part of a strip of `rows` row groups and 8 `blocks` tokens to a warp's sums.

    The first part waits for the strip, of which `ahead` later ones may be on their way. Outputs
    $(4 (r blocks + i) + 2 h + e): the sum of row g + 8 h of row group r and token 2 t + e of block i, in lane 4 g + t.
    Inputs: the same sums before, the slot of the strip, the tokens, and, if a group is at least a strip, the address
    of its zero points. Tokens of several blocks are the outputs of `tokens_asm`; of one block the address of column 8 t
    of token g, and whether token g is one. Sums of a token that is none are undefined.
    """
    sums, bits, groups, width = 4 * rows * blocks, layout.bits, layout.groups, min(layout.bits, 4)
    _, _, dtype = FLOATS[bfloat]
    slot, x = f"${2 * sums}", 2 * sums + 1
    digits, steps, strides = bits // width, STEPS // groups, row_group_bytes(layout)
    places_of, count = slot_places(layout, rows), STEPS // parts_of_strip(blocks)
    first, last = part * count, (part + 1) * count - 1
    lines = [f"cp.async.wait_group {ahead};"] if part == 0 else []
    lines += [*lane_asm(slot), ".reg .b32 t;", ".reg .b16 low, high, few;", f".reg .f32 scale<2>, d<{sums}>;"]
    lines += [f".reg .b32 x<{4 * STEPS}>, a<{8 * digits}>;", ".reg .pred token;"]
    if blocks == 1:
        lines.append(f"setp.ne.s32 token, ${x + 1}, 0;")
        zero_points = x + 2
    else:
        zero_points = x + token_registers(blocks)
    for r in range(rows):
        lines += [
            f".reg .b32 w{r}_<{4 * bits}>, s{r}_<{groups}>, z{r}_<{max(1, groups // 2)}>, zero{r}_<{2 * digits}>;"
        ]
        for name, prefix in (("words", "w"), ("scales", "s"), ("zeros", "z")):
            for piece, place in places_of.items():
                if piece[:2] == (name, r):
                    lines.append(load_asm(f"{prefix}{r}_", piece[2], place))
        if reads_zeros(layout):
            lines.append(f"ld.global.nc.u16 few, [${zero_points}+{r * strides['zeros']}];")
            lines.append(f"cvt.u32.u16 z{r}_0, few;")
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    for step in range(first, last + 1):
        group = step // steps
        tokens = [f"${x + 4 * (step - first) * blocks + n}" for n in range(4 * blocks)]
        if blocks == 1:
            # A load that may leave its register as it was cannot move above a use: each load has registers of its own.
            tokens = [f"x{4 * step + n}" for n in range(4)]
            lines.append(f"@token ld.global.v4.b32 {{{', '.join(tokens)}}}, [${x}+{64 * step}];")
        for r in range(rows):
            if step == first or step % steps == 0:
                lines += [f"mov.b32 d{n}, 0;" for n in range(4 * r * blocks, 4 * (r + 1) * blocks)]
                for h in range(2):
                    targets = [f"zero{r}_{2 * digit + h}" for digit in range(digits)]
                    zeros = [f"z{r}_{n}" for n in range(max(1, groups // 2))]
                    lines += zero_asm(layout, group, h, zeros, targets, bfloat)
            for h in range(2):
                words = [f"w{r}_{(step // 4 * 2 + h) * bits + n}" for n in range(bits)]
                for p in range(4):
                    targets = [f"a{8 * digit + 4 * h + p}" for digit in range(digits)]
                    lines += pair_asm(bits, step % 4 * 4 + p, words, targets, bfloat)
                    for digit, target in enumerate(targets):
                        lines.append(f"sub.{dtype}x2 {target}, {target}, zero{r}_{2 * digit + h};")
            for half in range(2):
                for i in range(blocks):
                    b = f"{{{tokens[4 * i + 2 * half]}, {tokens[4 * i + 2 * half + 1]}}}"
                    d = "{" + ", ".join(f"d{4 * (r * blocks + i) + n}" for n in range(4)) + "}"
                    for at in range(2 * half, 8 * digits, 8):
                        lines.append(f"{mma} {d}, {{a{at}, a{at + 4}, a{at + 1}, a{at + 5}}}, {b}, {d};")
            if step == last or step % steps == steps - 1:
                lines += scale_asm(layout, f"s{r}_{group}", ["scale0", "scale1"])
                for n in range(4 * r * blocks, 4 * (r + 1) * blocks):
                    before = sums + n if step // steps == first // steps else n
                    lines.append(f"fma.rn.f32 ${n}, d{n}, scale{n % 4 // 2}, ${before};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def product_constraints(layout: GroupLayout, rows: int, blocks: int) -> str:
    sums = 4 * rows * blocks
    tokens = ["l", "r"] if blocks == 1 else ["r"] * token_registers(blocks)
    return ",".join(["=&f"] * sums + ["f"] * sums + ["r"] + tokens + ["l"] * reads_zeros(layout))


@triton.constexpr_function
def fetch_constraints(sources: int) -> str:
    return ",".join(["=r", "r", "r"] + ["l"] * sources)
