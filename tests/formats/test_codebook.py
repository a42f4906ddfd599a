"""Learned codebooks as a number format: layout, storage, bits, decoding."""

import json
import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from reference.codebook_bits import codebook_storage_bits

from lqer.config.specs import FormatSpec
from lqer.formats import Codebook, NonFiniteError, format_from_dict
from lqer.formats.codebook import factorize
from lqer.formats.logscale import decode_log_scales, fit_log_scales

FORMATS = [
    Codebook(2, 1, 256),
    Codebook(3, 1, 512),
    Codebook(2, 2, 2048),
    Codebook(3, 2, 8192),
    Codebook(2, 4, 65536),
    Codebook(1, 4, 1024, 128),
    Codebook(2, 2, 4096, scale_block_size=64),
    Codebook(2, 4, 4096, scale_block_size=32),
    Codebook(2, 1, 128, codebook_rank=2),
    Codebook(3, 1, 256, codebook_rank=4, scale_block_size=32),
]
SHAPES_AND_AXES = [
    ((24, 288), -1),
    ((9, 576), 1),
    ((64, 172), 1),
    ((172, 20), 0),
    ((2, 5, 64), 2),
    ((2, 64, 3), 1),
    ((12,), 0),
    ((3, 4), 1),
]

each_format = pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: "-".join(map(str, f.to_dict().values())))
# Every format on a ragged matrix, and every shape in three formats.
each_case = pytest.mark.parametrize(
    ("number_format", "shape", "axis"),
    [(f, (20, 172), 1) for f in FORMATS]
    + [(f, shape, axis) for f in (FORMATS[2], FORMATS[6], FORMATS[-1]) for shape, axis in SHAPES_AND_AXES],
    ids=str,
)


def sample(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@each_case
def test_packing_loses_nothing_and_is_charged_to_the_bit(number_format, shape, axis):
    quantized = number_format.quantize(sample(shape), axis)
    packed = quantized.pack()
    restored = number_format.unpack(packed, shape, axis)
    assert restored.parts.keys() == quantized.parts.keys() == packed.keys()
    for name, part in quantized.parts.items():
        assert restored.parts[name].dtype == part.dtype
        assert torch.equal(restored.parts[name], part)
    assert restored.dequantize().shape == shape
    assert torch.equal(restored.dequantize(), quantized.dequantize())
    assert all(part.is_contiguous() for part in packed.values())
    bits = {name: part.numel() * part.element_size() * 8 for name, part in packed.items()}
    assert quantized.code_bits == bits["codes"]
    assert quantized.metadata_bits == sum(bits.values()) - bits["codes"]
    length = shape[axis]
    stated = codebook_storage_bits(number_format, (math.prod(shape) // length, length))
    assert stated["index"] == bits["codes"]
    assert stated["codebook"] + stated["scale"] == quantized.metadata_bits


@each_case
def test_a_value_is_the_centroid_of_its_group_times_its_block_scale(number_format, shape, axis):
    quantized = number_format.quantize(sample(shape), axis)
    parts = quantized.parts
    values_RL = quantized.dequantize().movedim(axis, -1).reshape(-1, shape[axis])
    codes_RV = parts["codes"].reshape(len(values_RL), -1)
    layout = number_format.layout(*values_RL.shape)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        row = int(torch.randint(len(values_RL), (), generator=generator))
        column = int(torch.randint(shape[axis], (), generator=generator))
        group = row // layout.group_rows, column // layout.group_columns
        codebook = parts["codebooks"][group].double() * parts["codebook_scales"][group].double()
        if number_format.codebook_rank:
            codebook = (codebook @ parts["codebook_basis"].double()).unsqueeze(-1)
        vector, element = divmod(column, number_format.dimension)
        value = codebook[codes_RV[row, vector].long(), element]
        if number_format.scale_block_size:
            block = column // number_format.scale_block_size
            code = parts["scale_codes"].reshape(len(values_RL), -1)[row, block]
            value = value * 2.0 ** (
                parts["scale_offsets"][block].double() + parts["scale_steps"][block].double() * code
            )
        assert float(values_RL[row, column]) == pytest.approx(float(value), rel=1e-5, abs=1e-9)


@each_format
def test_a_format_survives_its_own_description(number_format):
    fields = json.loads(json.dumps(number_format.to_dict()))
    assert format_from_dict(fields) == number_format
    assert hash(format_from_dict(fields)) == hash(number_format)
    adapter = TypeAdapter(FormatSpec)
    assert adapter.validate_python(fields) == number_format


def test_pydantic_reports_rules_and_unknown_keys():
    adapter = TypeAdapter(FormatSpec)
    with pytest.raises(ValidationError, match="bits 3 \\* dimension 4 makes indices of 12 bits, above 8"):
        adapter.validate_python({"kind": "codebook", "bits": 3, "dimension": 4})
    with pytest.raises(ValidationError, match="columns"):
        adapter.validate_python({"kind": "codebook", "bits": 2, "columns": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits 0 is not in 1..8 (codebook)"),
        ({"bits": 2, "dimension": 3}, "dimension 3 is not one of 1, 2, 4 (codebook)"),
        (
            {"bits": 3, "dimension": 4},
            "bits 3 * dimension 4 makes indices of 12 bits, above 8: a codebook would hold 4096 centroids",
        ),
        ({"bits": 2, "group_size": 0}, "group_size 0 is not in 2.."),
        ({"bits": 2, "block_size": "row"}, "block_size 'row' is not in 2.."),
        (
            {"bits": 2, "block_size": 255, "group_size": 255},
            "block_size 255 is not a multiple of dimension 2 (codebook)",
        ),
        ({"bits": 2, "group_size": 1000}, "group_size 1000 is neither a multiple nor a divisor of block_size 256"),
        ({"bits": 2, "scale_block_size": 16}, "scale_block_size 16 is not one of 0, 32, 64 (codebook)"),
        ({"bits": 2, "dimension": 1, "codebook_rank": 4}, "codebook_rank 4 is not in 0..3 (codebook)"),
        ({"bits": 2, "codebook_rank": 2}, "codebook_rank 2 needs dimension 1, found 2 (codebook)"),
    ],
)
def test_a_format_that_cannot_be_is_refused_with_rule_and_value(fields, message):
    with pytest.raises(ValueError) as refusal:
        format_from_dict({"kind": "codebook", **fields})
    assert message in str(refusal.value)


def test_an_axis_that_vectors_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"an axis of 37 is not a multiple of dimension 2 \(codebook\)"):
        Codebook(2).quantize(torch.zeros(3, 37))


def test_a_tensor_without_rows_is_refused():
    with pytest.raises(ValueError, match="a tensor without rows has no codebooks"):
        Codebook(2).quantize(torch.zeros(0, 32))


@pytest.mark.parametrize(
    ("number_format", "index", "codebook", "scale"),
    [
        # index, K * D * 8 bits of codebook and 16 of its scale per l weights, 4 bits per block of N_s weights
        (Codebook(2, 1, 256), 2, (4 * 8 + 16) / 256, 0),
        (Codebook(2, 2, 2048), 2, (16 * 2 * 8 + 16) / 2048, 0),
        (Codebook(2, 4, 65536), 2, (256 * 4 * 8 + 16) / 65536, 0),
        (Codebook(3, 2, 8192), 3, (64 * 2 * 8 + 16) / 8192, 0),
        (Codebook(4, 2, 32768), 4, (256 * 2 * 8 + 16) / 32768, 0),
        (Codebook(2, 2, 4096, scale_block_size=64), 2, (16 * 2 * 8 + 16) / 4096, 4 / 64),
        (Codebook(3, 1, 256, codebook_rank=4), 3, (4 * 8 + 16) / 256, 0),
    ],
)
def test_nominal_bits_are_those_of_index_codebook_and_scale(number_format, index, codebook, scale):
    assert number_format.bits_per_value(4096) == pytest.approx(index + codebook + scale, rel=1e-12)
    # What a tensor has once comes on top: a basis, and offset and step of each column of blocks.
    once = number_format.codebook_rank * number_format.centroids * 32 + (4096 // 64 * 32 if scale else 0)
    stored = sum(codebook_storage_bits(number_format, (4096, 4096)).values())
    assert stored - once == number_format.bits_per_value(4096) * 4096 * 4096


def test_where_256_divides_the_columns_groups_are_those_of_the_paper():
    layout = Codebook(2, 2, 2048).layout(4096, 11008)
    assert (layout.group_rows, layout.group_columns) == (8, 256)
    layout = Codebook(2, 1, 128).layout(4096, 4096)
    assert (layout.group_rows, layout.group_columns) == (1, 128)


@pytest.mark.parametrize("length", [172, 288, 576, 768, 1536, 320])
@pytest.mark.parametrize("number_format", [Codebook(2, 2, 2048), Codebook(2, 4, 65536), Codebook(3, 1, 512)])
def test_elsewhere_columns_are_cut_evenly_and_a_codebook_serves_about_group_size_weights(number_format, length):
    layout = number_format.layout(4096, length)
    widths = [len(columns) for columns in layout.column_ranges()]
    assert sum(widths) == length
    assert max(widths) - min(widths) < 4 * len(widths)
    assert all(columns.start % number_format.dimension == 0 for columns in layout.column_ranges())
    assert layout.group_rows * length / len(widths) == pytest.approx(number_format.group_size, rel=0.35)
    nominal = number_format.bits_per_value(4096) - number_format.bits
    assert number_format.bits_per_value(length) - number_format.bits == pytest.approx(nominal, rel=0.5)


def test_grouping_is_undone_by_ungrouping_and_pads_with_zeros():
    layout = Codebook(2, 2, 1024, 128).layout(21, 300)
    x_RL = sample((21, 300)) + 1
    x_NB = layout.group(x_RL)
    assert x_NB.shape == (layout.row_groups * layout.column_groups, layout.group_rows * layout.group_columns)
    assert torch.equal(layout.ungroup(x_NB), x_RL)
    assert (x_NB == 0).sum() == x_NB.numel() - x_RL.numel()
    block = x_RL[layout.group_rows : 2 * layout.group_rows, : layout.group_columns]
    assert torch.equal(x_NB[layout.column_groups], block.flatten())


@each_format
def test_zeros_stay_zeros(number_format):
    values = number_format.quantize(torch.zeros(24, 288)).dequantize()
    assert torch.equal(values, torch.zeros(24, 288))


@pytest.mark.parametrize("number_format", [FORMATS[2], FORMATS[6], FORMATS[-1]], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_the_unit_of_a_weight_does_not_matter(number_format, scale):
    x = sample((24, 288)) * 50
    error = (number_format.quantize(x).dequantize() - x).norm() / x.norm()
    scaled = number_format.quantize(x * scale).dequantize()
    assert scaled.isfinite().all()
    assert (scaled.double() / scale - x).norm() / x.norm() == pytest.approx(float(error), rel=0.1)


def test_few_values_are_kept_to_the_accuracy_of_int8():
    values = torch.tensor([-0.5, -0.1, 0.25, 1.0])
    x = values[torch.randint(4, (16, 256), generator=torch.Generator().manual_seed(0))]
    decoded = Codebook(2, 1, 1024).quantize(x).dequantize()
    assert (decoded - x).abs().max() <= 0.5 / 127 * 1.005


def test_more_dimensions_and_more_bits_lower_the_error():
    x = sample((32, 512))
    errors = [
        float((f.quantize(x).dequantize() - x).norm() / x.norm())
        for f in (
            Codebook(2, 1, 256),
            Codebook(2, 2, 2048),
            Codebook(2, 4, 65536),
            Codebook(3, 1, 512),
            Codebook(4, 1, 1024),
        )
    ]
    assert errors == sorted(errors, reverse=True)


def test_centroids_are_codes_within_127_made_for_the_stored_scale():
    centroids_NKD = sample((7, 16, 2))
    stored = Codebook(2).encode_centroids(centroids_NKD)
    assert stored["codebooks"].dtype == torch.int8
    assert stored["codebooks"].abs().max() <= 127
    step_N = stored["codebook_scales"].float()
    decoded = Codebook(2).decode_centroids(stored)
    inside = decoded.abs() < 126.5 * step_N[:, None, None]
    assert ((decoded - centroids_NKD).abs() <= 0.5001 * step_N[:, None, None])[inside].all()


def test_a_rank_below_that_of_the_codebooks_is_the_best_approximation():
    centroids_NK = sample((40, 8)).sort(dim=1).values
    factors_Nr, basis_rK = factorize(centroids_NK, 3)
    error = (factors_Nr @ basis_rK - centroids_NK).double().norm()
    tail = torch.linalg.svdvals(centroids_NK.double())[3:].norm()
    assert error == pytest.approx(float(tail), rel=1e-4)
    assert factors_Nr.square().mean(0) == pytest.approx([1.0, 1.0, 1.0], rel=1e-4)


def test_codebooks_that_are_multiples_of_one_shape_need_rank_one():
    number_format = Codebook(2, 1, 256, codebook_rank=1)
    size_N = torch.linspace(1, 3, 20)
    centroids_NKD = (size_N[:, None] * torch.tensor([-1.5, -0.4, 0.4, 1.5])).unsqueeze(-1)
    decoded = number_format.decode_centroids(number_format.encode_centroids(centroids_NKD))
    torch.testing.assert_close(decoded, centroids_NKD, rtol=6e-3, atol=0)


def test_a_codebook_projected_onto_the_span_of_a_basis_stays_itself():
    number_format = Codebook(2, 1, 256, codebook_rank=2)
    factors_Nr, basis_rK = factorize(sample((30, 4)).sort(dim=1).values, 2)
    again = number_format.encode_centroids((factors_Nr @ basis_rK).unsqueeze(-1), basis_rK)
    first = number_format.encode_factors(factors_Nr, basis_rK)
    assert (again["codebooks"].int() - first["codebooks"].int()).abs().max() <= 1


def test_nan_is_refused_also_in_emulation():
    x = torch.full((2, 8), torch.nan)
    with pytest.raises(NonFiniteError, match="16 NaN and 0 infinite of 16 values"):
        Codebook(2).quantize(x)
    with pytest.raises(NonFiniteError):
        Codebook(2).fake_quantize(x)


def test_emulation_gives_the_values_of_quantize_in_the_input_dtype():
    x = sample((8, 64)).bfloat16()
    emulated = Codebook(2, 2, 256).fake_quantize(x)
    assert emulated.dtype == torch.bfloat16
    assert torch.equal(emulated, Codebook(2, 2, 256).quantize(x).dequantize(torch.bfloat16))


class TestLogScales:
    def test_a_scale_is_within_half_a_step_of_the_largest_magnitude(self):
        x_RL = sample((50, 160)) * torch.logspace(0, -3, 50)[:, None]
        scales = fit_log_scales(x_RL, 64)
        decoded_RL = decode_log_scales(scales, 50, 160, 64)
        for block, columns in enumerate((slice(0, 64), slice(64, 128), slice(128, 160))):
            largest_R = x_RL[:, columns].abs().amax(1)
            error_R = (decoded_RL[:, columns][:, 0].log2() - largest_R.log2()).abs()
            assert (error_R <= 0.51 * scales["scale_steps"][block] + 1e-2).all()
            assert (decoded_RL[:, columns] == decoded_RL[:, columns][:, :1]).all()

    def test_codes_span_their_range(self):
        codes_RS = fit_log_scales(sample((50, 160)), 32)["scale_codes"]
        assert (codes_RS.amin(0) == 0).all()
        assert (codes_RS.amax(0) == 15).all()

    def test_blocks_of_zeros_do_not_widen_the_range(self):
        x_RL = sample((50, 64))
        with_zeros_RL = torch.cat([x_RL, torch.zeros(3, 64)])
        scales, with_zeros = fit_log_scales(x_RL, 64), fit_log_scales(with_zeros_RL, 64)
        assert torch.equal(scales["scale_steps"], with_zeros["scale_steps"])
        assert torch.equal(with_zeros["scale_codes"][:50], scales["scale_codes"])
        assert not with_zeros["scale_codes"][50:].any()

    def test_equal_blocks_need_no_step(self):
        scales = fit_log_scales(torch.full((4, 64), 0.25), 32)
        assert not scales["scale_steps"].any()
        assert torch.equal(decode_log_scales(scales, 4, 64, 32), torch.full((4, 64), 0.25))


@pytest.mark.parametrize(
    "number_format",
    [
        Codebook(2, 2, group_size=256, block_size=32),
        Codebook(3, 2, group_size=1024, block_size=64, scale_block_size=32),
        Codebook(3, 1, group_size=128, block_size=32),
        Codebook(2, 4, group_size=2048, block_size=64),
    ],
)
def test_an_element_is_read_from_the_packed_bytes_as_documented(number_format):
    rows, length = 40, 96
    quantized = number_format.quantize(torch.randn(rows, length, generator=torch.Generator().manual_seed(0)))
    packed, values, layout = quantized.pack(), quantized.dequantize(), number_format.layout(rows, length)
    width, dimension = number_format.bits * number_format.dimension, number_format.dimension

    def code(name: str, row: int, index: int, bits: int) -> int:
        stream = int.from_bytes(bytes(packed[name][row].tolist()), "little")
        return stream >> index * bits & ((1 << bits) - 1)

    assert packed["codes"].shape[1] == math.ceil(length / dimension * width / 8)
    for row, column in [(0, 0), (0, 95), (7, 33), (8, 32), (19, 61), (31, 64), (39, 95)]:
        group = row // layout.group_rows, column // layout.group_columns
        k = code("codes", row, column // dimension, width)
        value = packed["codebooks"][group][k, column % dimension] * packed["codebook_scales"][group].float()
        if block := number_format.scale_block_size:
            s = column // block
            offset, step = packed["scale_offsets"][s].float(), packed["scale_steps"][s].float()
            value = value * (offset + step * code("scale_codes", row, s, 4)).exp2()
        assert float(value) == pytest.approx(float(values[row, column]), rel=1e-6)
