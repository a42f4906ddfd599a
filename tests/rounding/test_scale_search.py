"""Scales by search: against a loop over the candidates, and what a search can never make worse.

Shapes: O out_features, I in_features, G groups of a row, g values of a group.
"""

import pytest
import torch

from lqer.formats import E8P, Int, MXInt, NonFiniteError
from lqer.rounding import Gptq, Nearest, scale_search
from lqer.rounding.factor import inverse_factor
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp
from lqer.rounding.ldlq import ldlq
from lqer.rounding.nearest import nearest
from lqer.rounding.scale_search import searched_scales

FORMATS = [
    Int(2, 32),
    Int(3, 40, symmetric=True),
    Int(4, "row"),
    Int(8, 16, scale_dtype="bfloat16"),
    MXInt(2, 16),
    MXInt(3, 32, scale_rounding="floor"),
    MXInt(3, 32, levels="mid-rise"),
]
each_format = pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: "-".join(map(str, f.to_dict().values())))


@pytest.fixture
def weight_OI():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 160, generator=generator) * torch.randn(160, generator=generator).exp()


@pytest.fixture
def importance_I():
    return torch.randn(160, generator=torch.Generator().manual_seed(1)).mul(2).exp()


def weighted_errors(number_format, x_Gg, scales, importance_g):
    values_Gg = number_format.decode(number_format.encode(x_Gg, scales), scales)
    return ((values_Gg - x_Gg).double().square() * importance_g).sum(-1)


@each_format
def test_the_first_candidate_is_the_formats_own_fit(number_format, weight_OI):
    fitted, candidates = number_format.fit(weight_OI), number_format.scale_candidates(weight_OI)
    assert fitted.keys() == candidates.keys()
    for name, part in fitted.items():
        assert torch.equal(candidates[name][0], part)
        assert candidates[name].dtype == part.dtype
        assert len(candidates[name]) > 1


def test_a_format_without_others_offers_its_fit_alone(weight_OI):
    assert not E8P(2).has_scale_candidates
    assert all(len(part) == 1 for part in E8P(2).scale_candidates(weight_OI).values())


def test_candidates_of_zero_blocks_stay_zero_blocks():
    candidates = MXInt(3).scale_candidates(torch.zeros(2, 16))
    assert not candidates["exponents"].any()
    zeros = Int(2, 16).scale_candidates(torch.zeros(2, 16))
    assert not Int(2, 16).decode(Int(2, 16).encode(torch.zeros(1, 2, 16), zeros), zeros).any()


@each_format
@pytest.mark.parametrize("most_values", [1, 1 << 26], ids=["row by row", "at once"])
def test_it_takes_the_candidate_with_the_least_weighted_error(number_format, most_values, weight_OI, monkeypatch):
    monkeypatch.setattr(scale_search, "MOST_VALUES", most_values)
    importance_g = torch.rand(160, generator=torch.Generator().manual_seed(1))
    found = searched_scales(number_format, weight_OI, importance_g)
    candidates = number_format.scale_candidates(weight_OI)
    errors_CG = torch.stack([
        weighted_errors(number_format, weight_OI, {name: part[c] for name, part in candidates.items()}, importance_g)
        for c in range(len(next(iter(candidates.values()))))
    ])  # fmt: skip
    torch.testing.assert_close(
        weighted_errors(number_format, weight_OI, found, importance_g), errors_CG.amin(0), rtol=1e-5, atol=0
    )


@each_format
def test_nearest_under_searched_scales_never_has_more_weighted_error(number_format, weight_OI, importance_I):
    statistics = {"mean_square": importance_I}
    searched = Nearest(scales="search").round(weight_OI, statistics, number_format).dequantize()
    fitted = Nearest().round(weight_OI, {}, number_format).dequantize()
    errors_O = [((x - weight_OI).square() * importance_I).sum(-1) for x in (searched, fitted)]
    assert (errors_O[0] <= errors_O[1] * (1 + 1e-5)).all()
    assert errors_O[0].sum() < errors_O[1].sum()


@each_format
def test_least_squares_asks_for_nothing_and_has_the_least_plain_error(number_format, weight_OI, importance_I):
    rounding = Nearest(scales="least-squares")
    assert rounding.statistics == frozenset()
    found = rounding.round(weight_OI, {}, number_format).dequantize()
    others = Nearest().round(weight_OI, {}, number_format), nearest(weight_OI, importance_I, number_format)
    errors = [(x - weight_OI).square().sum() for x in (found, *(other.dequantize() for other in others))]
    assert errors[0] <= min(errors[1:])


@pytest.mark.parametrize("rounding", [gptq, ldlq])
def test_under_least_squares_only_the_weights_of_a_group_decide_its_first_scale(rounding, make_layer):
    weight_OI, hessian_II = make_layer(16, 64)
    number_format = Int(3, "row")
    found = rounding(weight_OI, damp(hessian_II), number_format, scales="least-squares")
    expected = Nearest(scales="least-squares").round(weight_OI, {}, number_format)
    assert torch.equal(found.parts["scales"], expected.parts["scales"])


def test_a_ragged_last_group_counts_its_own_columns_only(weight_OI, importance_I):
    whole = nearest(weight_OI[:, :72], importance_I[:72], Int(2, 32))
    last = nearest(weight_OI[:, 64:72], importance_I[64:72], Int(2, 8))
    assert torch.equal(whole.dequantize()[:, 64:], last.dequantize())


def test_searched_rounding_asks_for_the_mean_square_and_keeps_no_fixed_scales():
    assert {statistic.kind for statistic in Nearest(scales="search").statistics} == {"mean_square"}
    assert Nearest().statistics == frozenset()
    assert Nearest().keeps_scales
    assert not Nearest(scales="search").keeps_scales


def test_a_weight_that_is_not_finite_is_refused(importance_I):
    with pytest.raises(NonFiniteError, match="160 NaN"):
        nearest(torch.full((1, 160), torch.nan), importance_I, Int(2, 32))


def test_gptq_weights_the_first_group_by_its_schur_complements(make_layer):
    weight_OI, hessian_II = make_layer(16, 64)
    damped = damp(hessian_II)
    importance_I = inverse_factor(damped).diagonal().pow(-2).float()
    expected = searched_scales(Int(3, 32), weight_OI[:, :32], importance_I[:32])
    found = Gptq(scales="search").round(weight_OI, {"hessian": hessian_II}, Int(3, 32))
    for name, part in expected.items():
        assert torch.equal(found.parts[name][:, 0], part)


def test_static_groups_are_searched_with_the_weights_of_their_place_in_the_order(make_layer):
    weight_OI, hessian_II = make_layer(16, 64)
    damped = damp(hessian_II)
    order_I = damped.hessian_II.diagonal().argsort(descending=True, stable=True)
    importance_I = torch.empty(64)
    importance_I[order_I] = inverse_factor(damped, order_I).diagonal().pow(-2).float()
    expected = nearest(weight_OI, importance_I, Int(3, 32))
    found = gptq(weight_OI, damped, Int(3, 32), activation_order=True, scales="search")
    assert torch.equal(found.parts["scales"], expected.parts["scales"])


@pytest.mark.parametrize("rounding", [gptq, ldlq])
@pytest.mark.parametrize("number_format", [Int(2, 64), Int(3, 64), MXInt(2, 32)], ids=str)
def test_a_search_lowers_the_loss_of_error_feedback(rounding, number_format, make_layer, loss):
    for seed in range(3):
        weight_OI, hessian_II = make_layer(32, 320, seed)
        fitted = loss(rounding(weight_OI, damp(hessian_II), number_format), weight_OI, hessian_II)
        searched = loss(rounding(weight_OI, damp(hessian_II), number_format, scales="search"), weight_OI, hessian_II)
        assert searched < fitted


def test_ldlq_weights_the_last_group_by_the_diagonal_of_its_decomposition(make_layer):
    # With uncorrelated inputs nothing moves: the scales are those of rounding to nearest, weighted by H's diagonal.
    weight_OI = make_layer(16, 64)[0]
    diagonal_I = torch.linspace(0.1, 3, 64)
    expected = nearest(weight_OI, diagonal_I + 0.01 * diagonal_I.mean(), Int(2, 16))
    found = ldlq(weight_OI, damp(torch.diag(diagonal_I)), Int(2, 16), scales="search")
    assert torch.equal(found.dequantize(), expected.dequantize())
