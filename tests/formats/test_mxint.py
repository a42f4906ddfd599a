"""MXINT against the published implementations' outputs, and against its definition written out for one number."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from reference.lqer_mxint import lqer_values

from lqer.formats import Int, MXInt, QuantizedTensor

VECTORS = json.loads((Path(__file__).parent / "mxint_vectors.json").read_text())
BLOCKS = {block["name"]: block for block in VECTORS["blocks"]}
WIDTHS = [2, 3, 4, 6, 8]

# LQER adds 1e-9 to every magnitude, which takes ties up where |x| < 2^-5, and leaves |x| <= 1e-8 as it is.
CLEAN_DIFFERS_FROM_LQER = {
    "powers_of_two_ramp": {6, 8},  # ties at 2^-7 and 2^-9
    "ties_w6": {6},
    "ties_w8": {8},
    "ties_scaled_2em20": {4},
    "tiny_1e-7": set(WIDTHS),
    "tiny_1e-8": set(WIDTHS),
    "tiny_1e-10": set(WIDTHS),
    "fp32_denormals": set(WIDTHS),
    "denormal_plus_normal": set(WIDTHS),
    "above_2e127": set(WIDTHS),  # LQER's shared scale 2^128 overflows: NaN
}
# QERA multiplies codes by the scale before dividing by 2^(bits - 2): infinity although the value is representable.
QERA_OVERFLOWS = {"max_2e127": {3, 4, 6, 8}, "above_2e127": {3, 4, 6, 8}}


def tensor(digits: str, shape=(-1,)) -> torch.Tensor:
    count = len(digits) // 8
    return torch.tensor(struct.unpack(f">{count}f", bytes.fromhex(digits))).reshape(shape)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal numbers: NaN matches NaN, -0 matches +0."""
    return actual.shape == expected.shape and bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())


def by_definition(block: list[float], bits: int, scale_rounding: str) -> list[float]:
    """MXINT of one block in Python floats, where every step is exact."""
    largest = max(map(abs, block))
    if largest == 0 or (scale_rounding == "floor" and largest < 2.0**-126):
        return [0.0] * len(block)
    mantissa, exponent = math.frexp(largest)  # mantissa in [0.5, 1)
    if scale_rounding == "floor" or mantissa == 0.5:
        exponent -= 1
    step = 2.0 ** (min(max(exponent, -126), 127) - (bits - 1 if scale_rounding == "ceil" else bits - 2))
    limit = 2 ** (bits - 1) - 1
    return [step * max(-limit, min(limit, round(x / step))) for x in block]


def mid_rise_by_definition(block: list[float], bits: int, scale_rounding: str) -> list[float]:
    """The same with mid-rise levels."""
    largest = max(map(abs, block))
    if largest == 0 or (scale_rounding == "floor" and largest < 2.0**-126):
        return [0.0] * len(block)
    mantissa, exponent = math.frexp(largest)
    if scale_rounding == "floor" or mantissa == 0.5:
        exponent -= 1
    step = 2.0 ** (min(max(exponent, -126), 127) - (bits - 1 if scale_rounding == "ceil" else bits - 2))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [step * (max(low, min(high, math.floor(x / step))) + 0.5) for x in block]


def blocks_of_all_magnitudes() -> torch.Tensor:
    """[1024, 16]: maxima over the whole range of float32, subnormals and exact powers of two included."""
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.rand(1024, 16, generator=generator, dtype=torch.float64) * 2 - 1
    mantissas[::4, 3] = 1.0
    exponents = torch.linspace(-148, 128, 1024, dtype=torch.float64).round().unsqueeze(-1)
    limit = torch.finfo(torch.float32).max
    return (mantissas * 2.0**exponents).clamp(-limit, limit).to(torch.float32)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_reference_equals_the_published_code(name):
    x = tensor(BLOCKS[name]["input"])
    for bits in WIDTHS:
        assert same(lqer_values(x, bits), tensor(BLOCKS[name]["lqer"][str(bits)])), bits


@pytest.mark.parametrize("name", BLOCKS)
def test_clean_differs_from_lqer_only_where_a_quirk_acts(name):
    x = tensor(BLOCKS[name]["input"])
    for bits in WIDTHS:
        agrees = same(MXInt(bits).fake_quantize(x), tensor(BLOCKS[name]["lqer"][str(bits)]))
        assert agrees == (bits not in CLEAN_DIFFERS_FROM_LQER.get(name, set())), bits


@pytest.mark.parametrize("name", BLOCKS)
def test_floor_equals_qera_and_is_right_where_qera_overflows(name):
    x = tensor(BLOCKS[name]["input"])
    for bits in WIDTHS:
        expected = tensor(BLOCKS[name]["qera"][str(bits)])
        overflowed = expected.isinf()
        assert bool(overflowed.any()) == (bits in QERA_OVERFLOWS.get(name, set())), bits
        expected = torch.where(overflowed, torch.tensor(by_definition(x.tolist(), bits, "floor")), expected)
        mxint = MXInt(bits, scale_rounding="floor")
        assert same(mxint.quantize(x).dequantize(), expected), bits
        assert same(mxint.fake_quantize(x), expected), bits


@pytest.mark.parametrize("case", VECTORS["tensors"], ids=lambda case: case["name"])
def test_whole_tensors_equal_lqer(case):
    x, expected = tensor(case["input"], case["shape"]), tensor(case["output"], case["shape"])
    block_size = "row" if case["block_size"] == -1 else case["block_size"]
    mxint = MXInt(case["bits"], block_size)
    assert same(lqer_values(x, case["bits"], block_size, case["axis"]), expected)
    # LQER leaves a block of values around 1e-9 unquantized.
    agrees = case["name"] != "near_zero_block"
    assert same(mxint.quantize(x, case["axis"]).dequantize(), expected) == agrees
    assert same(mxint.fake_quantize(x, case["axis"]), expected) == agrees


@pytest.mark.parametrize("scale_rounding", ["ceil", "floor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_values_follow_the_definition_over_the_whole_range_of_float32(bits, scale_rounding):
    x = blocks_of_all_magnitudes()
    expected = torch.tensor([by_definition(block, bits, scale_rounding) for block in x.tolist()])
    mxint = MXInt(bits, scale_rounding=scale_rounding)
    assert torch.equal(mxint.fake_quantize(x), expected)
    assert torch.equal(mxint.quantize(x).dequantize(), expected)


@pytest.mark.parametrize("scale_rounding", ["ceil", "floor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_decodes_exactly_under_every_exponent_and_encodes_back(bits, scale_rounding):
    mxint = MXInt(bits, scale_rounding=scale_rounding)
    limit = 2 ** (bits - 1) - 1
    codes = torch.arange(-limit, limit + 1, dtype=torch.int8).expand(255, -1)
    scales = {"exponents": torch.arange(255, dtype=torch.uint8)}
    values = mxint.decode(codes, scales)
    exponents = torch.arange(255, dtype=torch.float64).unsqueeze(-1) - 127 - mxint.fraction_bits
    assert torch.equal(values.double(), codes.double() * 2.0**exponents)
    assert torch.equal(mxint.encode(values, scales)[1:], codes[1:])
    assert not mxint.encode(values, scales)[0].any()  # byte 0 is a zero block


def test_exponent_255_decodes_to_nan_whatever_the_code():
    codes = torch.arange(-7, 8, dtype=torch.int8).unsqueeze(0)
    assert MXInt(4).decode(codes, {"exponents": torch.tensor([255], dtype=torch.uint8)}).isnan().all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_maximum_that_is_a_power_of_two_saturates_under_ceil_and_is_kept_under_floor(bits):
    x = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert MXInt(bits).fake_quantize(x)[0] == 1 - 2.0 ** (1 - bits)
    assert MXInt(bits, scale_rounding="floor").fake_quantize(x)[0] == 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_ceil_and_floor_agree_unless_the_maximum_is_a_power_of_two(bits):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(MXInt(bits).fake_quantize(x), MXInt(bits, scale_rounding="floor").fake_quantize(x))


def test_ceil_moves_a_maximum_again_once_it_has_rounded_to_a_power_of_two():
    once = MXInt(4).fake_quantize(torch.tensor([0.52, 0.1]))
    assert once.tolist() == [0.5, 0.125]
    assert MXInt(4).fake_quantize(once).tolist() == [0.4375, 0.125]
    kept = MXInt(4).fake_quantize(torch.tensor([0.7, 0.1]))
    assert kept.tolist() == [0.75, 0.125]
    assert MXInt(4).fake_quantize(kept).tolist() == [0.75, 0.125]


@pytest.mark.parametrize("scale_rounding", ["ceil", "floor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_is_at_most_half_a_step_where_no_code_saturates(bits, scale_rounding):
    mxint = MXInt(bits, scale_rounding=scale_rounding)
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(2))
    quantized = mxint.quantize(x)
    step = 2.0 ** (quantized.parts["exponents"].float() - 127 - mxint.fraction_bits)
    step = step.repeat_interleave(16, dim=-1)
    inside = x.abs() <= mxint.max_code * step
    error = (quantized.dequantize() - x).abs()
    assert inside.float().mean() > 0.5
    assert (error <= step / 2)[inside].all()
    assert (error <= step)[~inside].all()


def test_scaling_by_a_power_of_two_scales_the_values():
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    for exponent in (-100, -17, 5, 100):
        for scale_rounding in ("ceil", "floor"):
            mxint = MXInt(5, scale_rounding=scale_rounding)
            assert torch.equal(mxint.fake_quantize(x * 2.0**exponent), mxint.fake_quantize(x) * 2.0**exponent)


@pytest.mark.parametrize("bits", range(2, 9))
def test_values_equal_lqer_where_none_of_its_quirks_acts(bits):
    # At least 2^-5, where adding 1e-9 changes no float32, and far from the ends of the range.
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(6))
    x = torch.where(x.abs() < 2.0**-5, 0.0, x)
    assert torch.equal(MXInt(bits).fake_quantize(x), lqer_values(x, bits))


def test_a_maximum_just_above_a_large_power_of_two_doubles_the_step_here_and_not_in_lqer():
    x = torch.tensor([2.0**20 * (1 + 2.0**-23), 0.0])
    assert MXInt(4).quantize(x).parts["exponents"].item() == 127 + 21
    assert MXInt(4).fake_quantize(x)[0] == 2.0**20
    assert lqer_values(x, 4)[0] == 2.0**20 * 0.875


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_exactly_symmetric_integers_with_a_bfloat16_scale(bits):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    quantized = MXInt(bits, block_size=32).quantize(x)
    steps = 2.0 ** (quantized.parts["exponents"].float() - 127 - (bits - 1))
    parts = {"codes": quantized.parts["codes"], "scales": steps.to(torch.bfloat16)}
    integer = Int(bits, block_size=32, symmetric=True, scale_dtype="bfloat16")
    assert torch.equal(QuantizedTensor(integer, (32, 64), 1, parts).dequantize(), quantized.dequantize())


@pytest.mark.parametrize("scale_rounding", ["ceil", "floor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mid_rise_values_follow_the_definition_over_the_whole_range_of_float32(bits, scale_rounding):
    x = blocks_of_all_magnitudes()
    expected = torch.tensor([mid_rise_by_definition(block, bits, scale_rounding) for block in x.tolist()])
    mxint = MXInt(bits, scale_rounding=scale_rounding, levels="mid-rise")
    assert torch.equal(mxint.fake_quantize(x), expected)
    assert torch.equal(mxint.quantize(x).dequantize(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_mid_rise_levels_are_the_odd_multiples_of_half_a_step_and_encode_to_their_own_codes(bits):
    mxint = MXInt(bits, levels="mid-rise")
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).expand(254, -1)
    scales = {"exponents": torch.arange(1, 255, dtype=torch.uint8)}
    values = mxint.decode(codes, scales)
    assert values.shape[1] == 2**bits
    half_steps = 2.0 ** (torch.arange(1, 255, dtype=torch.float64).unsqueeze(-1) - 128 - mxint.fraction_bits)
    assert torch.equal(values.double(), (2 * codes.double() + 1) * half_steps)
    assert torch.equal(values.to(torch.bfloat16).float()[10:], values[10:])  # 2 k + 1 has at most eight bits
    assert torch.equal(mxint.encode(values, scales), codes)


def test_a_mid_rise_block_of_zeros_decodes_to_zeros_and_one_with_nan_or_infinity_to_nan():
    mxint = MXInt(3, levels="mid-rise")
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, torch.nan, 2.0], [0.5, -torch.inf, 1.0]])
    values = mxint.fake_quantize(x)
    assert torch.equal(values[0], torch.zeros(3))
    assert values[1:].isnan().all()
    zeros = mxint.quantize(x[:1])
    assert zeros.parts["exponents"].item() == 0
    assert torch.equal(zeros.dequantize(), torch.zeros(1, 3))
    codes = torch.arange(-4, 4, dtype=torch.int8).unsqueeze(0)
    assert mxint.decode(codes, {"exponents": torch.tensor([255], dtype=torch.uint8)}).isnan().all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_mid_rise_levels_reach_every_value_of_a_block_to_half_a_step(bits):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(2))
    x[0, 3] = 4.0
    for scale_rounding in ("ceil", "floor"):
        mxint = MXInt(bits, scale_rounding=scale_rounding, levels="mid-rise")
        quantized = mxint.quantize(x)
        step = 2.0 ** (quantized.parts["exponents"].float() - 127 - mxint.fraction_bits)
        assert ((quantized.dequantize() - x).abs() <= step.repeat_interleave(16, dim=-1) / 2).all()


@pytest.mark.parametrize(("bits", "gain"), [(2, 1.6), (3, 1.3), (4, 1.1)])
def test_under_the_better_of_two_exponents_mid_rise_levels_have_less_error_at_few_bits(bits, gain):
    x = torch.randn(4096, 1, 32, generator=torch.Generator().manual_seed(0))

    def least_error(mxint: MXInt) -> torch.Tensor:
        errors = []
        for lower in (0, 1):
            scales = {"exponents": mxint.fit(x)["exponents"] - lower}
            errors.append((mxint.decode(mxint.encode(x, scales), scales) - x).square().sum(-1))
        return torch.minimum(*errors).mean()

    assert least_error(MXInt(bits, 32)) > gain * least_error(MXInt(bits, 32, levels="mid-rise"))


def test_levels_other_than_mid_tread_and_mid_rise_are_refused():
    with pytest.raises(ValueError, match="levels 'odd'"):
        MXInt(4, levels="odd")


def test_levels_are_mid_tread_unless_said():
    assert MXInt(4) == MXInt(4, levels="mid-tread")
