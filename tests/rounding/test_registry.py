"""Roundings as a configuration names them: the functions behind them, and what they object to."""

from __future__ import annotations

from functools import partial

import pytest
import tomli
import tomli_w
import torch

from lqer.components import component_from_dict
from lqer.formats import E8P, Codebook, Int, MXInt, Passthrough
from lqer.formats.kmeans import fit_centroids
from lqer.rounding import ROUNDINGS, Gptq, Ldlq, Nearest, Rounding, Vector
from lqer.rounding.codebook_update import update_codebooks
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import DampedHessian
from lqer.rounding.ldlq import ldlq
from lqer.rounding.vector import sweep_vectors
from lqer.statistics import Hessian


@pytest.fixture
def weight_OI():
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hessian_II():
    x_TI = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    x_TI[:, 1:] += 0.8 * x_TI[:, :-1]
    return x_TI.T @ x_TI / len(x_TI)


def test_a_named_rounding_is_its_function_with_its_settings(weight_OI, hessian_II):
    w3 = Int(3, 32)
    pairs = [
        (Gptq(damping=0.02), gptq(weight_OI, DampedHessian(hessian_II, 0.02), w3)),
        (Ldlq(tune_iters=1), ldlq(weight_OI, DampedHessian(hessian_II), w3, tune_iters=1)),
    ]
    for rounding, expected in pairs:
        assert torch.equal(rounding.round(weight_OI, {"hessian": hessian_II}, w3).dequantize(), expected.dequantize())
    codebook = Codebook(bits=2, dimension=2, group_size=512)
    found = Vector(iterations=5).round(weight_OI, {"hessian": hessian_II}, codebook)
    fit = partial(fit_centroids, centroids=codebook.centroids, iterations=5)
    swept = sweep_vectors(weight_OI, DampedHessian(hessian_II), codebook, fit)
    assert torch.equal(found.dequantize(), update_codebooks(weight_OI, hessian_II, swept).dequantize())


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_a_rounding_survives_being_written_down(kind):
    rounding = component_from_dict(Rounding, {"kind": kind})
    assert component_from_dict(Rounding, tomli.loads(tomli_w.dumps(rounding.to_dict()))) == rounding


@pytest.mark.parametrize("kind", ["gptq", "ldlq", "vector"])
def test_error_feedback_asks_for_the_hessian(kind):
    assert ROUNDINGS[kind]().statistics == {Hessian()}


@pytest.mark.parametrize(
    ("rounding", "number_format", "reason"),
    [
        (Gptq(), Codebook(bits=2), 'rounding "vector" does that'),
        (Gptq(scales="search"), E8P(2), 'has no scales to choose from in number format "e8p"'),
        (Ldlq(scales="search"), Int(4, "tensor"), 'block_size "tensor" has one scale for all of them'),
        (Nearest(scales="search"), Passthrough("float16"), 'no scales to choose from in number format "passthrough"'),
        (Ldlq(), Passthrough("float16"), "no rounding error to compensate"),
        (Vector(), MXInt(4), 'its weights are of kind "codebook", not "mxint"'),
    ],
)
def test_a_combination_without_sense_is_objected_to_with_the_reason(rounding, number_format, reason):
    assert reason in rounding.unsupported_reason(number_format)
    assert Gptq(activation_order=True, scales="search").unsupported_reason(Int(4, 128)) is None


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"kind": "gptq", "damping": -1}, "damping -1 is not a number of at least 0"),
        ({"kind": "ldlq", "tune_iters": 1.5}, "tune_iters 1.5 is not an integer"),
        ({"kind": "gptq", "scales": "best"}, "scales 'best' is not one of 'minmax', 'search', 'least-squares'"),
        ({"kind": "vector", "update": "sgd"}, "update 'sgd' is not one of"),
        ({"kind": "gptq", "dampin": 1}, "unknown key 'dampin'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        component_from_dict(Rounding, settings)
