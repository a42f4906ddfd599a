"""Codebooks: packed without loss, dequantized as in emulation, multiplied according to the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_layers import DTYPE, DTYPES, ON_GPU, Layer, build_layer, random_input, relative_error

from lqer.formats import Codebook, MXInt, NumberFormat, Passthrough
from lqer.kernels import PackedLinear, packed_linear
from lqer.kernels.codebooks.launch import run_codebook
from lqer.kernels.dequantize_launch import dequantize_weight, run_dequantized
from lqer.kernels.layout.codebook import IndexLayout, tile_of
from lqer.kernels.reference import reference_linear, reference_weight
from lqer.kernels.spec import decode_spec, encode_spec

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
# Indices of 1 to 8 bits, groups of one and of several rows, whole and partial groups, a table of low rank.
FORMATS = [
    Codebook(1, 1, 128, 64),
    Codebook(2, 1, 256),
    Codebook(3, 1, 512),
    Codebook(4, 1, 64, 128),
    Codebook(2, 1, 512, codebook_rank=2),
    Codebook(2, 2, 512, 64),
    Codebook(3, 2, 2048),
    Codebook(4, 2, 2048, 128),
    Codebook(2, 4, 4096),
]


def build(number_format: Codebook, n: int = 37, k: int = 192, **options: Any) -> Layer:
    return build_layer(number_format, n, k, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_dequantized_weights_equal_emulation_bit_for_bit(number_format, dtype):
    layer = build(number_format, dtype=dtype)
    expected = layer.weight.dequantize(dtype)
    assert torch.equal(reference_weight(layer.packed.weight, dtype), expected)
    assert torch.equal(dequantize_weight(layer.packed.weight, dtype), expected)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_sums_equal_float64_to_a_millionth(number_format):
    layer = build(number_format, bias=True)
    for m in (1, 3):
        x_MI = random_input(m, 192)
        assert relative_error(run_codebook(x_MI, layer.packed, torch.float32), layer.exact(x_MI)) < 1e-6


@pytest.mark.parametrize("activation", [None, MXInt(8)], ids=str)
@pytest.mark.parametrize("rank", [0, 16])
def test_branch_rounding_and_bias_give_the_formula(rank, activation):
    layer = build(Codebook(2, 2, 512, 64), rank=rank, activation=activation, bias=True)
    x_MI = random_input(5, 192)
    exact = layer.exact(x_MI)
    for y_MO in (
        run_codebook(x_MI, layer.packed),
        run_dequantized(x_MI, layer.packed),
        reference_linear(x_MI, layer.packed),
    ):
        assert relative_error(y_MO, exact) < 1.8 * TOLERANCE[DTYPE]


@pytest.mark.parametrize(("rank", "m"), [(1, 1), (48, 3), *([(32, 1), (100, 8), (256, 16)] if ON_GPU else [])])
@pytest.mark.parametrize(
    ("activation", "factor"),
    [(None, MXInt(8, 32)), (MXInt(8, 32), MXInt(8)), (MXInt(6), Passthrough("float16"))],
    ids=str,
)
def test_every_rank_gives_the_formula_with_few_tokens(rank, m, activation: NumberFormat | None, factor: NumberFormat):
    layer = build(Codebook(2, 2, 512, 64), 22, 64, rank=rank, activation=activation, factor=factor)
    x_MI = random_input(m, 64)
    assert relative_error(run_codebook(x_MI, layer.packed), layer.exact(x_MI)) < 3 * TOLERANCE[DTYPE]


@pytest.mark.parametrize("m", range(1, 131) if ON_GPU else range(1, 18))
def test_every_number_of_tokens_gives_the_formula(m):
    layer = build(Codebook(2, 2, 512, 64), 9, 64)
    x_MI = random_input(m, 64)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize(("n", "k"), [(1, 8), (16, 288), (30, 100), (33, 260)])
def test_shapes_need_not_be_multiples_of_a_group(n, k):
    layer = build(Codebook(2, 2, 1024), n, k)
    x_MI = random_input(2, k)
    assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("group_rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize(("bits", "dimension"), [(2, 1), (4, 2)])
def test_groups_may_have_any_number_of_rows(bits, dimension, group_rows):
    number_format = Codebook(bits, dimension, group_rows * 64, 64)
    layer = build(number_format, 2 * group_rows, 128)
    layout = layer.packed.weight.layout
    assert layout.group_rows == group_rows
    assert torch.equal(dequantize_weight(layer.packed.weight, DTYPE), layer.weight.dequantize(DTYPE))
    x_MI = random_input(2, 128)
    assert relative_error(run_codebook(x_MI, layer.packed, torch.float32), layer.exact(x_MI)) < 1e-6


@pytest.mark.parametrize("bits", [2, 3])
def test_groups_of_single_values_may_have_an_odd_number_of_columns(bits):
    layer = build(Codebook(bits, 1, 67 * 4, 67), 9, 201)
    assert layer.packed.weight.layout.group_columns == 67
    assert torch.equal(dequantize_weight(layer.packed.weight, DTYPE), layer.weight.dequantize(DTYPE))
    x_MI = random_input(3, 201)
    assert relative_error(run_codebook(x_MI, layer.packed, torch.float32), layer.exact(x_MI)) < 1e-6


@pytest.mark.parametrize("m", [1, 3])
def test_rows_of_x_need_not_be_aligned(m):
    layer = build(Codebook(2, 2, 512, 64), 9, 64)
    x_MI = random_input(m, 64)
    apart = torch.full((m, 67), torch.nan, dtype=DTYPE, device=x_MI.device)
    apart[:, 1:65] = x_MI
    assert torch.equal(run_codebook(apart[:, 1:65], layer.packed), run_codebook(x_MI, layer.packed))


def test_a_token_that_is_not_finite_does_not_change_the_others():
    layer = build(Codebook(2, 2, 512, 64), 9, 64)
    x_MI = random_input(3, 64)
    expected = run_codebook(x_MI, layer.packed)
    x_MI[1, 7] = torch.nan
    y_MO = run_codebook(x_MI, layer.packed)
    assert torch.equal(y_MO[::2], expected[::2])
    assert y_MO[1].isnan().all()


def test_a_tile_has_all_tables_of_its_rows_and_words():
    for group_rows in range(1, 40):
        for group_columns in (4, 16, 66, 256, 272, 1024):
            layout = IndexLayout(4096, 2, 4, group_rows, group_columns)
            tile = tile_of(layout)
            for length, group, tables in (
                (tile.rows, group_rows, tile.row_groups),
                (tile.words, layout.words, tile.column_groups),
            ):
                for first in range(0, 40 * length, length):
                    assert (first + length - 1) // group - first // group < tables


def test_a_packed_codebook_holds_no_more_than_its_indices_and_tables():
    layer = build(Codebook(2, 2, 2048), 64, 512)
    packed = layer.packed.weight
    assert packed.words.nbytes == 64 * 512 * 2 // 8
    assert packed.table.nbytes == 64 * 512 // 2048 * 16 * 2 * DTYPE.itemsize


def test_block_scales_and_vectors_along_axis_0_are_refused():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    scaled, turned = Codebook(2, 2, 512, 64, scale_block_size=32), Codebook(2, 2, 512, 64)
    with pytest.raises(ValueError, match="scale_block_size 32: kernels do not support block scales"):
        PackedLinear.pack(scaled.quantize(weight), None, None, None, None, DTYPE)
    with pytest.raises(ValueError, match="vectors must be along axis 1"):
        PackedLinear.pack(turned.quantize(weight, axis=0), None, None, None, None, DTYPE)


def test_decoding_inverts_encoding_of_a_spec():
    spec = build(Codebook(3, 2, 2048), rank=16).packed.spec
    assert decode_spec(encode_spec(spec)) == spec
