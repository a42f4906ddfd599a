"""GPTVQ's sweep: GPTQ where it must be, exact where GPTVQ's code is not, better with every dimension."""

import dataclasses
from functools import partial

import pytest
import torch
from reference.codebook_bits import codebook_storage_bits
from reference.gptvq import gptvq_values
from vq_layers import loss, round_vector, student_layer

from lqer.formats import Codebook, Int, NonFiniteError
from lqer.formats.kmeans import fit_centroids
from lqer.rounding.codebook_update import update_codebooks
from lqer.rounding.hessian import DampedHessian, damp
from lqer.rounding.vector import sweep_vectors


def uniform_codebooks(weight_OI, bits, columns):
    """The grids of `Int` as codebooks: one per row and block of columns, values (code - zero) * scale."""
    grid = Int(bits, columns, scale_dtype="bfloat16").quantize(weight_OI)
    levels_K = torch.arange(1 << bits, dtype=torch.int16)
    codes_OCK = (levels_K - grid.parts["zeros"].unsqueeze(-1)).to(torch.int8)
    return grid, {"codebooks": codes_OCK.unsqueeze(-1), "codebook_scales": grid.parts["scales"]}


def plain_gptq(weight_OI, hessian_II, grid, columns, damping=0.01):
    """GPTQ with frozen grids, by eliminating one column of the inverse Hessian after the other, in float64."""
    weight_OI, hessian_II = weight_OI.double(), hessian_II.double()
    size = len(hessian_II)
    inverse_II = torch.linalg.inv(hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(size))
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.uint8)
    for i in range(size):
        scale_O = grid.parts["scales"][:, i // columns].double()
        zero_O = grid.parts["zeros"][:, i // columns].double()
        code_O = (weight_OI[:, i] / scale_O).round().add(zero_O).clamp(0, grid.format.max_code)
        codes_OI[:, i] = code_O.to(torch.uint8)
        error_O = (weight_OI[:, i] - (code_O - zero_O) * scale_O) / inverse_II[i, i]
        weight_OI[:, i:] -= error_O[:, None] * inverse_II[i, i:]
        inverse_II = inverse_II - inverse_II[:, i : i + 1] @ inverse_II[i : i + 1] / inverse_II[i, i]
    return codes_OI


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_fixed_uniform_codebook_reproduces_gptq_bit_for_bit(bits, seed):
    weight_OI, hessian_II = student_layer(48, 320, seed)
    columns = Codebook(bits, 1, 64, 64).layout(*weight_OI.shape).group_columns
    grid, codebooks = uniform_codebooks(weight_OI, bits, columns)
    found = sweep_vectors(weight_OI, DampedHessian(hessian_II), Codebook(bits, 1, 64, 64), codebooks)
    codes_OI = plain_gptq(weight_OI, hessian_II, grid, columns)
    assert torch.equal(found.parts["codes"], codes_OI)
    expected = dataclasses.replace(grid, parts=grid.parts | {"codes": codes_OI})
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert not torch.equal(codes_OI, grid.parts["codes"])  # feedback did something


@pytest.mark.parametrize(
    "number_format", [Codebook(2, 1, 256), Codebook(2, 2, 2048), Codebook(2, 2, 2048, 128, 64)], ids=str
)
def test_white_inputs_mean_no_feedback(number_format):
    weight_OI, _ = student_layer()
    codebooks = number_format.quantize(weight_OI)
    fixed = {name: part for name, part in codebooks.parts.items() if name.startswith("codebook")}
    for hessian_II in (torch.eye(256), 7.5 * torch.eye(256, dtype=torch.float64)):
        found = sweep_vectors(weight_OI, DampedHessian(hessian_II), number_format, fixed)
        assert torch.equal(found.parts["codes"], codebooks.parts["codes"])
        assert torch.equal(found.dequantize(), codebooks.dequantize())


@pytest.mark.parametrize("number_format", [Codebook(2, 1, 256), Codebook(2, 2, 2048), Codebook(2, 4, 16384)], ids=str)
def test_feedback_lowers_the_loss_below_that_of_k_means(number_format):
    weight_OI, hessian_II = student_layer()
    blind = loss(weight_OI, hessian_II, number_format.quantize(weight_OI).dequantize())
    assert loss(weight_OI, hessian_II, round_vector(weight_OI, hessian_II, number_format).dequantize()) < 0.75 * blind


def sweep_from_seeds(weight_OI, hessian_II, number_format):
    """The sweep alone, its k-means begun like the published one."""
    fit = partial(fit_centroids, centroids=number_format.centroids, seeds="mahalanobis")
    return sweep_vectors(weight_OI, DampedHessian(hessian_II), number_format, fit)


def mean_loss(number_format, count=3, quantize=round_vector):
    layers = [student_layer(64, 512, seed) for seed in range(count)]
    return sum(loss(*layer, quantize(*layer, number_format).dequantize()) for layer in layers) / count


def test_learned_values_beat_gptq_at_the_same_index_bits():
    gptq = 0.0
    for seed in range(3):
        weight_OI, hessian_II = student_layer(64, 512, seed)
        _, codebooks = uniform_codebooks(weight_OI, 2, 256)
        number_format = Codebook(2, 1, 256)
        found = sweep_vectors(weight_OI, DampedHessian(hessian_II), number_format, codebooks)
        gptq += loss(weight_OI, hessian_II, found.dequantize()) / 3
    assert mean_loss(Codebook(2, 1, 256)) < 0.6 * gptq


def test_the_loss_falls_with_every_dimension_at_equal_bits():
    one, two, four = (mean_loss(f) for f in (Codebook(2, 1, 256), Codebook(2, 2, 2048), Codebook(2, 4, 65536)))
    assert four < two < one


@pytest.mark.parametrize(
    "number_format", [Codebook(2, 2, 2048), Codebook(2, 4, 16384), Codebook(2, 2, 4096, scale_block_size=64)], ids=str
)
def test_the_consistent_choices_beat_the_published_ones(number_format):
    published = sum(
        loss(*layer, gptvq_values(*layer, number_format)) / 3
        for layer in (student_layer(64, 512, seed) for seed in range(3))
    )
    assert mean_loss(number_format, quantize=sweep_from_seeds) < 0.95 * published


@pytest.mark.parametrize(("out_features", "in_features"), [(24, 288), (20, 172), (7, 576), (1, 64), (65, 96)])
@pytest.mark.parametrize(
    "number_format", [Codebook(2, 1, 256), Codebook(2, 2, 2048, scale_block_size=32), Codebook(2, 4, 16384)], ids=str
)
def test_ragged_shapes_are_swept_to_the_end(number_format, out_features, in_features):
    weight_OI, hessian_II = student_layer(out_features, in_features)
    quantized = round_vector(weight_OI, hessian_II, number_format)
    restored = number_format.unpack(quantized.pack(), weight_OI.shape, 1)
    assert torch.equal(restored.dequantize(), quantized.dequantize())
    assert quantized.code_bits == codebook_storage_bits(number_format, weight_OI.shape)["index"]
    blind = loss(weight_OI, hessian_II, number_format.quantize(weight_OI).dequantize())
    assert loss(weight_OI, hessian_II, quantized.dequantize()) <= blind + 1e-4


def test_groups_of_rows_do_not_see_each_other():
    weight_OI, hessian_II = student_layer(21, 256)
    number_format = Codebook(2, 2, 2048)
    assert number_format.layout(21, 256).group_rows == number_format.layout(14, 256).group_rows == 7
    whole, part = (
        update_codebooks(rows_OI, hessian_II, sweep_from_seeds(rows_OI, hessian_II, number_format))
        for rows_OI in (weight_OI, weight_OI[:14])
    )
    torch.testing.assert_close(whole.dequantize()[:14], part.dequantize())


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_the_unit_of_the_inputs_does_not_matter(factor):
    weight_OI, hessian_II = student_layer()
    first, second = (round_vector(weight_OI, h, Codebook(2)).dequantize() for h in (hessian_II, factor * hessian_II))
    assert torch.equal(first, second)


def test_a_seed_decides_everything():
    weight_OI, hessian_II = student_layer()
    first, again, other = (round_vector(weight_OI, hessian_II, Codebook(2), seed=seed).pack() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["codes"], other["codes"])


@pytest.mark.parametrize("number_format", [Codebook(2, 1, 256), Codebook(2, 2, 2048)], ids=str)
def test_a_hessian_that_is_damped_is_not_damped_again(number_format):
    weight_OI, hessian_II = student_layer()
    settings = {"update": "none", "seed": 3}
    expected = round_vector(weight_OI, hessian_II, number_format, damping=0.1, **settings)
    found = round_vector(weight_OI, damp(hessian_II, 0.1), number_format, damping=0.5, **settings)
    assert all(torch.equal(found.parts[name], part) for name, part in expected.parts.items())


def test_inputs_that_were_never_seen_cost_the_others_nothing():
    weight_OI, hessian_II = student_layer()
    alive = loss(weight_OI, hessian_II, round_vector(weight_OI, hessian_II, Codebook(2)).dequantize())
    hessian_II[100:110] = hessian_II[:, 100:110] = 0
    quantized_OI = round_vector(weight_OI, hessian_II, Codebook(2)).dequantize()
    assert quantized_OI.isfinite().all()
    assert loss(weight_OI, hessian_II, quantized_OI) < 1.1 * alive


def test_the_sweep_knows_the_codebooks_as_they_are_stored():
    weight_OI, hessian_II = student_layer()
    for number_format in (Codebook(2, 2, 2048), Codebook(2, 1, 128, codebook_rank=2)):
        fitted = round_vector(weight_OI, hessian_II, number_format, update="none")
        fixed = {name: part for name, part in fitted.parts.items() if name.startswith("codebook")}
        again = sweep_vectors(weight_OI, DampedHessian(hessian_II), number_format, fixed)
        assert torch.equal(again.parts["codes"], fitted.parts["codes"])


def test_low_rank_codebooks_cost_little_once_the_sweep_knows_the_basis():
    weight_OI, hessian_II = student_layer(64, 512)
    full = loss(weight_OI, hessian_II, round_vector(weight_OI, hessian_II, Codebook(3, 1, 256)).dequantize())
    half = round_vector(weight_OI, hessian_II, Codebook(3, 1, 256, codebook_rank=4))
    assert loss(weight_OI, hessian_II, half.dequantize()) < 1.25 * full
    assert half.parts["codebooks"].shape[-1] == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_float_dtype_are_computed_on_in_float32(dtype):
    weight_OI, hessian_II = student_layer()
    found = round_vector(weight_OI.to(dtype), hessian_II, Codebook(2))
    expected = round_vector(weight_OI.to(dtype).float(), hessian_II.double(), Codebook(2))
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_the_weight_is_left_alone():
    weight_OI, hessian_II = student_layer()
    before = weight_OI.clone(), hessian_II.clone()
    round_vector(weight_OI, hessian_II, Codebook(2))
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(hessian_II, before[1])


def test_input_that_makes_no_sense_is_refused():
    weight_OI, hessian_II = student_layer(8, 64)
    broken_OI = weight_OI.clone()
    broken_OI[3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="1 NaN and 0 infinite of 512 values"):
        round_vector(broken_OI, hessian_II, Codebook(2))
    with pytest.raises(ValueError, match=r"a Hessian of shape \(63, 63\) does not fit 64 in_features"):
        round_vector(weight_OI, hessian_II[1:, 1:], Codebook(2))
    with pytest.raises(ValueError, match="the hessian holds 4096 values that are not finite"):
        round_vector(weight_OI, hessian_II * torch.nan, Codebook(2))
    with pytest.raises(ValueError, match="an axis of 63 is not a multiple of dimension 2"):
        round_vector(weight_OI[:, 1:], hessian_II[1:, 1:], Codebook(2))
