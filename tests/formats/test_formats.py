"""What holds for every number format."""

import dataclasses
import doctest
import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from lqer.config.specs import FormatSpec
from lqer.formats import (
    E8P,
    MX,
    Int,
    MXInt,
    NonFiniteError,
    NormalFloat,
    NumberFormat,
    Passthrough,
    format_from_dict,
    pack_together,
)
from lqer.formats.blocks import block_width

ROOT = Path(__file__).parents[2]
FORMATS = [
    MXInt(2),
    MXInt(3, block_size=32),
    MXInt(4),
    MXInt(4, scale_rounding="floor"),
    MXInt(4, block_size="tensor"),
    MXInt(5, block_size="row"),
    MXInt(8),
    MXInt(2, levels="mid-rise"),
    MXInt(4, block_size="tensor", levels="mid-rise"),
    MXInt(8, block_size="row", levels="mid-rise"),
    Int(2, block_size=32),
    Int(3, symmetric=True, scale_dtype="bfloat16"),
    Int(4, block_size=16, scale_dtype="float32"),
    Int(4, block_size="tensor"),
    Int(2, block_size="tensor", symmetric=True),
    Int(7, block_size="row"),
    Int(8, block_size="row", symmetric=True),
    MX("mxfp8_e4m3"),
    MX("mxfp8_e5m2", block_size="row"),
    MX("mxfp6_e3m2", element_rounding="away"),
    MX("mxfp6_e2m3"),
    MX("mxfp4_e2m1", block_size=16),
    MX("mxint8"),
    MX("mxfp8_e4m3", block_size="tensor"),
    Passthrough(),
    Passthrough("float16"),
    Passthrough("bfloat16"),
    E8P(2),
    E8P(3, opt_scale=1.0),
    E8P(4),
    E8P(2, block_size=16, scale_dtype="float16"),
    E8P(4, block_size="row"),
    NormalFloat(2, block_size="tensor", nearest="cdf"),
    NormalFloat(3, block_size=32, nearest="cdf"),
    NormalFloat(4),
    NormalFloat(8, scale_dtype="bfloat16"),
]
# One format for each way through the code: codes that cross bytes, zero points, scales of a row and of a tensor,
# element tables, no scales at all, vectors, levels.
ONE_PER_PATH = [
    MXInt(3, block_size=32),
    MXInt(3, block_size=32, levels="mid-rise"),
    Int(2, block_size=32),
    Int(4, block_size="tensor"),
    Int(8, block_size="row", symmetric=True),
    MX("mxfp4_e2m1", block_size=16),
    Passthrough("bfloat16"),
    E8P(2, block_size=16, scale_dtype="float16"),
    E8P(4),
    NormalFloat(3, block_size=32, nearest="cdf"),
]
QUANTIZING = [f for f in FORMATS if f.kind != "passthrough"]
WITH_A_ZERO = [f for f in FORMATS if f.kind != "e8p" and getattr(f, "levels", "") != "mid-rise"]
ONE_SCALE = [f for f in FORMATS if f.block_size == "tensor"]
PER_BLOCK = [f for f in QUANTIZING if f not in ONE_SCALE]
# The residual of a lattice code is rounded greedily, so that a value may have a better first point than its own.
NOT_GREEDY = [f for f in FORMATS if not (f.kind == "e8p" and f.bits > 2)]


def describe(number_format: NumberFormat) -> str:
    return "-".join(str(value) for value in number_format.to_dict().values())


each_format = pytest.mark.parametrize("number_format", FORMATS, ids=describe)
each_format_with_a_zero = pytest.mark.parametrize("number_format", WITH_A_ZERO, ids=describe)
each_format_that_is_not_greedy = pytest.mark.parametrize("number_format", NOT_GREEDY, ids=describe)
each_format_with_one_scale = pytest.mark.parametrize("number_format", ONE_SCALE, ids=describe)
each_format_per_block = pytest.mark.parametrize("number_format", PER_BLOCK, ids=describe)
each_quantizing_format = pytest.mark.parametrize("number_format", QUANTIZING, ids=describe)
# A ragged matrix with blocks along the rows, and three dims with blocks along a ragged last one: for every format.
SHAPES_AND_AXES = [((40, 6), 0), ((2, 3, 37), 2)]
OTHER_SHAPES_AND_AXES = [((3, 64), -1), ((2, 20, 5), 1), ((7,), 0), ((4, 1), -1), ((0, 32), 1)]
each_case = pytest.mark.parametrize(
    ("number_format", "shape", "axis"),
    [(f, *case) for f in FORMATS for case in SHAPES_AND_AXES]
    + [(f, *case) for f in ONE_PER_PATH for case in OTHER_SHAPES_AND_AXES],
    ids=lambda value: describe(value) if isinstance(value, NumberFormat) else str(value).replace(" ", ""),
)


def in_blocks(number_format: NumberFormat) -> NumberFormat:
    """The format in blocks of 16 where its scales are of rows or of the tensor."""
    return (
        dataclasses.replace(number_format, block_size=16)
        if isinstance(number_format.block_size, str)
        else number_format
    )


def sample(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Normal values whose rows differ in scale, with a few exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * 2.0 ** torch.randint(-6, 7, (*shape[:-1], 1), generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x).to(dtype)


@each_case
def test_fake_quantize_gives_the_values_of_quantize(number_format, shape, axis):
    x = sample(shape)
    quantized = number_format.quantize(x, axis)
    emulated = number_format.fake_quantize(x, axis)
    assert emulated.is_contiguous()
    assert quantized.dequantize().is_contiguous()
    assert torch.equal(emulated, quantized.dequantize())
    assert quantized.shape == shape
    assert quantized.axis == axis % len(shape)


@pytest.mark.parametrize("number_format", ONE_PER_PATH, ids=describe)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fake_quantize_keeps_the_dtype(number_format, dtype):
    x = sample((40, 6), dtype)
    emulated = number_format.fake_quantize(x, 0)
    assert emulated.dtype == dtype
    assert torch.equal(emulated, number_format.quantize(x, 0).dequantize(dtype))


@each_case
def test_packing_loses_nothing_and_its_bits_are_the_bits_charged(number_format, shape, axis):
    quantized = number_format.quantize(sample(shape), axis)
    packed = quantized.pack()
    restored = number_format.unpack(packed, shape, axis)
    assert restored.axis == quantized.axis
    assert restored.parts.keys() == quantized.parts.keys() == packed.keys()
    for name, part in quantized.parts.items():
        assert restored.parts[name].dtype == part.dtype
        assert torch.equal(restored.parts[name], part)
    assert torch.equal(restored.dequantize(), quantized.dequantize())
    assert all(part.is_contiguous() for part in packed.values())
    bits = {name: part.numel() * part.element_size() * 8 for name, part in packed.items()}
    assert quantized.code_bits == bits.pop("codes")
    assert quantized.metadata_bits == sum(bits.values())
    assert quantized.zero_bits == bits.get("zeros", 0)


@each_case
def test_tensors_are_packed_together_as_each_alone(number_format, shape, axis):
    tensors = [number_format.quantize(sample(shape, seed=seed), axis) for seed in range(3)]
    for count in range(4):
        together, alone = pack_together(tensors[:count]), [one.pack() for one in tensors[:count]]
        for packed, expected in zip(together, alone, strict=True):
            assert packed.keys() == expected.keys()
            assert all(torch.equal(packed[name], part) for name, part in expected.items())
            assert all(part.is_contiguous() for part in packed.values())


@each_format
def test_the_bits_charged_are_the_nominal_ones_when_rows_fill_whole_bytes(number_format):
    # Zero points of a whole row, fewer than 8 bits each, would round up to a byte.
    x = sample((4, 2048))
    if number_format.block_size == "row" and number_format.kind == "int" and not number_format.symmetric:
        number_format = dataclasses.replace(number_format, bits=8)
    quantized = number_format.quantize(x)
    nominal = number_format.bits_per_value(2048) * x.numel()
    if number_format.block_size == "tensor":
        assert number_format.bits_per_value(2048) * x.numel() == quantized.code_bits
        assert quantized.metadata_bits <= 40
    else:
        assert quantized.code_bits + quantized.metadata_bits == nominal


def test_nominal_bits_count_a_ragged_last_block():
    assert MXInt(4).bits_per_value(32) == 4.5
    assert MXInt(4).bits_per_value(20) == 4 + 2 * 8 / 20
    assert MXInt(4, block_size="row").bits_per_value(64) == 4.125
    assert MXInt(4).bits_per_value(8) == 5
    assert Int(4).bits_per_value(256) == 4 + 20 / 128
    assert Int(4, symmetric=True, scale_dtype="float32").bits_per_value(128) == 4.25
    assert MX("mxfp6_e3m2").bits_per_value(64) == 6.25
    assert Passthrough("bfloat16").bits_per_value(5) == 16
    assert E8P(3).bits_per_value(64) == 3
    assert E8P(2).bits_per_value(12) == 32 / 12
    assert E8P(2, block_size=32).bits_per_value(64) == 3
    assert NormalFloat(4).bits_per_value(128) == 4.25


@each_format_that_is_not_greedy
def test_values_encode_to_their_own_codes(number_format):
    quantized = number_format.quantize(sample((16, 64)))
    blocks = (-1, block_width(64, number_format.block_size))
    values_NB = quantized.dequantize().unflatten(-1, blocks)
    codes_NB = number_format.encode(values_NB, quantized.parts)
    assert torch.equal(number_format.decode(codes_NB, quantized.parts), values_NB)


@pytest.mark.parametrize(
    "number_format",
    [f for f in FORMATS if f.kind in ("mx", "passthrough") or getattr(f, "scale_rounding", "") == "floor"],
    ids=describe,
)
def test_quantizing_twice_changes_nothing_where_rounding_keeps_the_maximum_in_its_binade(number_format):
    values = number_format.fake_quantize(sample((16, 64)))
    assert torch.equal(number_format.fake_quantize(values), values)


@each_quantizing_format
def test_codes_can_be_made_column_by_column_with_frozen_scales(number_format):
    number_format = in_blocks(number_format)
    x_NB = sample((5, 3, number_format.block_size))
    scales = number_format.fit(x_NB)
    columns = x_NB.split(number_format.vector_size, dim=-1)
    codes_NB = torch.cat([number_format.encode(column_NB, scales) for column_NB in columns], dim=-1)
    assert torch.equal(codes_NB, number_format.encode(x_NB, scales))
    assert torch.equal(number_format.decode(codes_NB, scales), number_format.round_blocks(x_NB))


@each_quantizing_format
def test_a_ragged_last_block_is_quantized_as_if_padded_with_zeros(number_format):
    number_format = in_blocks(number_format)
    size = number_format.block_size
    x = sample((4, 2 * size + size // 2))
    padded = torch.nn.functional.pad(x, (0, size - size // 2))
    assert torch.equal(number_format.fake_quantize(x), number_format.fake_quantize(padded)[:, : x.shape[1]])


@each_quantizing_format
def test_an_axis_shorter_than_a_block_is_one_block(number_format):
    x = sample((4, 12))
    block = dataclasses.replace(number_format, block_size=16)
    row = dataclasses.replace(number_format, block_size="row")
    assert torch.equal(block.fake_quantize(x), row.fake_quantize(x))


@each_format
def test_blocks_run_along_the_axis_asked_for(number_format):
    x = sample((6, 48, 4))
    assert torch.equal(number_format.fake_quantize(x, 1), number_format.fake_quantize(x.mT).mT)
    assert torch.equal(number_format.quantize(x, -2).parts["codes"], number_format.quantize(x.mT).parts["codes"])


@each_format_per_block
def test_blocks_do_not_see_each_other(number_format):
    x = sample((2, 256))
    y = x.clone()
    y[:, 128:] *= 1000
    y[1] = 0
    if number_format.block_size == "row":
        assert torch.equal(number_format.fake_quantize(y)[1], torch.zeros(256))
    else:
        assert torch.equal(number_format.fake_quantize(y)[0, :128], number_format.fake_quantize(x)[0, :128])


@each_format_with_one_scale
def test_one_scale_serves_the_whole_tensor(number_format):
    x = sample((4, 64))
    scales = number_format.quantize(x).parts
    flat = dataclasses.replace(number_format, block_size="row").quantize(x.flatten()).parts
    for name in set(scales) - {"codes"}:
        assert scales[name].shape == (1, 1)
        assert scales[name].item() == flat[name].item()
    assert torch.equal(scales["codes"].flatten(), flat["codes"])


@each_format_with_a_zero
def test_zeros_stay_zeros(number_format):
    x = torch.zeros(2, 40)
    x[1, :5] = 3.0
    quantized = number_format.quantize(x)
    assert not quantized.dequantize()[0].any()
    assert not quantized.dequantize()[1, 5:].any()
    assert not number_format.fake_quantize(-torch.zeros(3, 5)).any()


@each_format
def test_nan_and_infinity_are_refused_with_their_count(number_format):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.ones(2, 8, dtype=dtype)
        x[0, 1] = x[1, 1] = torch.nan
        x[0, 3] = -torch.inf
        with pytest.raises(NonFiniteError, match=r"^2 NaN and 1 infinite of 16 values$"):
            number_format.quantize(x)


@each_quantizing_format
def test_emulation_turns_a_block_with_nan_or_infinity_into_nan(number_format):
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = sample((2, 32))
        x[0, 5] = bad
        emulated = number_format.fake_quantize(x)
        assert emulated[0, :16].isnan().all()
        if number_format in ONE_SCALE:
            assert emulated.isnan().all()
        else:
            assert emulated[1].isfinite().all()


def test_float64_that_overflows_float32_is_refused():
    with pytest.raises(NonFiniteError, match="0 NaN and 1 infinite of 2 values"):
        MXInt(4).quantize(torch.tensor([1e300, 1.0], dtype=torch.float64))


def test_a_value_beyond_float16_is_refused_by_its_passthrough():
    with pytest.raises(NonFiniteError, match="0 NaN and 1 infinite of 2 values"):
        Passthrough("float16").quantize(torch.tensor([1e5, 1.0]))


@each_quantizing_format
def test_tiny_and_huge_inputs_give_finite_values(number_format):
    for exponent in (-149, -140, -127, -126, -120, 100, 127):
        x = (torch.linspace(-1, 1, 33, dtype=torch.float64) * 2.0**exponent).float()
        values = number_format.fake_quantize(x)
        assert values.isfinite().all()
        assert torch.equal(values, number_format.quantize(x).dequantize())


@each_format_with_a_zero  # the lattice search, which is for weights, waits
def test_emulation_never_waits_for_the_device(number_format):
    # A meta tensor has no data: whatever asks for a value raises.
    x = torch.empty(3, 40, dtype=torch.bfloat16, device="meta")
    assert number_format.fake_quantize(x).shape == x.shape


@each_format
def test_the_input_is_left_alone_and_not_shared(number_format):
    x = sample((4, 64)).requires_grad_()
    before = x.detach().clone()
    emulated, quantized = number_format.fake_quantize(x), number_format.quantize(x)
    assert not emulated.requires_grad
    assert not quantized.dequantize().requires_grad
    emulated.zero_()
    for part in quantized.parts.values():
        part.zero_()
    assert torch.equal(x.detach(), before)


def test_an_axis_that_is_not_there_or_has_no_element_is_refused():
    with pytest.raises(ValueError, match=r"axis 2 is not an axis of a tensor of shape \(3, 4\)"):
        MXInt(4).quantize(torch.zeros(3, 4), axis=2)
    with pytest.raises(ValueError, match=r"axis -1 of a tensor of shape \(3, 0\) has no element"):
        MXInt(4).fake_quantize(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"axis -1 is not an axis of a tensor of shape \(\)"):
        MXInt(4).quantize(torch.tensor(1.0))


@each_format
def test_a_format_survives_its_own_description(number_format):
    fields = json.loads(json.dumps(number_format.to_dict()))
    assert next(iter(fields)) == "kind"
    assert format_from_dict(fields) == number_format
    assert hash(format_from_dict(fields)) == hash(number_format)


@each_format
def test_pydantic_reads_what_to_dict_wrote(number_format):
    read = TypeAdapter(FormatSpec).validate_python(number_format.to_dict())
    assert read == number_format
    assert type(read) is type(number_format)


def test_the_examples_in_the_documentation_are_true():
    results = doctest.testfile(str(ROOT / "docs" / "formats.md"), module_relative=False, encoding="utf-8")
    assert results.attempted > 0
    assert results.failed == 0
