"""What a configuration means for one linear."""

from __future__ import annotations

from typing import Any

import pytest

from lqer.config import Config, plan_linear
from lqer.formats import MXInt, Passthrough
from lqer.methods import Caldera, LqerAct, LqerSvd
from lqer.rounding import Nearest
from lqer.transforms import Hadamard

FORMATS = {f"w{bits}": {"kind": "mxint", "bits": bits} for bits in (3, 4, 8)}
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


def config(**quantize: Any) -> Config:
    return Config.model_validate(
        {"model": "m", "tag": "t", "formats": FORMATS, "quantize": {"weight": "w4", **quantize}}
    )


def test_names_become_number_formats():
    plan = plan_linear(
        config(activation="w8", bias="w3", low_rank={"rank": 5, "format": "w8", "axis": "lqer"}, method="lqer-svd"),
        UP,
    )
    assert (plan.weight, plan.activation, plan.bias, plan.factor) == (MXInt(4), MXInt(8), MXInt(3), MXInt(8))
    assert (plan.method, plan.rank, plan.factor_axis) == (LqerSvd(), 5, "lqer")


def test_none_leaves_activations_and_biases_alone_and_stores_factors_as_halves():
    plan = plan_linear(config(activation="none", bias="none", low_rank={"rank": 5, "format": "none"}), UP)
    assert plan.activation is None
    assert plan.bias is None
    assert plan.factor == Passthrough("float16")


def test_the_first_override_that_matches_wins():
    both = [{"match": "*.down_proj", "weight": "w8"}, {"match": "*.mlp.*", "weight": "w3", "activation": "w8"}]
    assert plan_linear(config(override=both), DOWN).weight == MXInt(8)
    assert plan_linear(config(override=both), DOWN).activation is None
    assert plan_linear(config(override=both), UP).weight == MXInt(3)
    assert plan_linear(config(override=both[::-1]), DOWN).weight == MXInt(3)


def test_an_override_of_one_key_leaves_the_others():
    base = {"activation": "w8", "low_rank": {"rank": 5, "format": "w8", "axis": "lqer"}}
    override = [{"match": "*.down_proj", "low_rank": {"rank": 9}}]
    plan = plan_linear(config(**base, override=override), DOWN)
    assert (plan.rank, plan.factor, plan.factor_axis) == (9, MXInt(8), "lqer")
    assert (plan.weight, plan.activation) == (MXInt(4), MXInt(8))
    assert plan_linear(config(**base, override=override), UP).rank == 5


@pytest.mark.parametrize(("key", "value"), [("activation", "none"), ("bias", "none")])
def test_an_override_can_switch_off(key, value):
    override = [{"match": "*.down_proj", key: value}]
    switched = config(activation="w8", bias="w8", override=override)
    assert getattr(plan_linear(switched, DOWN), key) is None
    assert getattr(plan_linear(switched, UP), key) == MXInt(8)


def test_an_override_can_set_the_rank_to_zero():
    plan = plan_linear(config(low_rank={"rank": 5}, override=[{"match": "*", "low_rank": {"rank": 0}}]), UP)
    assert plan.rank == 0


def test_a_skipped_linear_has_no_plan_whatever_the_overrides():
    skipping = config(skip=["*.down_proj"], override=[{"match": "*.down_proj", "weight": "w8"}])
    assert plan_linear(skipping, DOWN) is None
    assert plan_linear(skipping, UP) is not None


def test_a_pattern_is_matched_to_the_whole_name_and_its_case():
    assert plan_linear(config(skip=["down_proj", "*.Down_proj", "model.layers.1*"]), DOWN) is not None
    assert plan_linear(config(skip=["model.layers.[0-3].*"]), DOWN) is None


def test_a_rounding_is_named_or_described():
    for rounding in ("nearest", {"kind": "nearest"}):
        assert plan_linear(config(rounding=rounding), UP).rounding == Nearest()
        override = [{"match": "*.up_proj", "rounding": rounding}]
        assert plan_linear(config(override=override), UP).rounding == Nearest()


def test_iterations_are_the_methods_own_unless_said_otherwise():
    rank = {"rank": 5}
    assert plan_linear(config(method="loftq", low_rank=rank), UP).iterations == 5
    assert plan_linear(config(method="loftq", low_rank={**rank, "iterations": 2}), UP).iterations == 2
    assert plan_linear(config(method="qera-exact", low_rank=rank), UP).iterations == 1


def test_under_a_budget_the_rank_is_open_unless_an_override_fixes_it():
    overrides = [{"match": "*.down_proj", "low_rank": {"rank": 0}}, {"match": "*", "weight": "w8"}]
    budget = config(low_rank={"budget_bits": 5.5}, override=overrides)
    assert plan_linear(budget, UP).rank is None
    assert plan_linear(budget, DOWN).rank == 0


def test_the_solver_and_its_seed_reach_the_plan():
    plan = plan_linear(config(low_rank={"rank": 5, "solver": "krylov"}), UP)
    assert (plan.solver, plan.seed) == ("krylov", 0)


def test_an_asymmetric_target_propagates_errors_and_can_be_set_per_linear():
    quantize = config(asymmetric=0.25, override=[{"match": "*down_proj", "asymmetric": 0.0}])
    assert quantize.quantize.propagates_error
    assert not config().quantize.propagates_error
    assert (plan_linear(quantize, UP).asymmetric, plan_linear(quantize, DOWN).asymmetric) == (0.25, 0.0)


def test_a_rotation_is_part_of_the_plan_and_of_its_baseline():
    plain, rotated = plan_linear(config(), UP), plan_linear(config(transforms=["hadamard"]), UP)
    assert (plain.transform, rotated.transform) == (None, Hadamard())
    assert rotated.without_low_rank().transform == Hadamard()


def test_caldera_has_settings_of_its_own_and_b_a_format_of_its_own():
    low_rank = {"rank": 8, "format": "w4", "format_b": "w8", "axis": "outer"}
    plan = plan_linear(config(method={"kind": "caldera", "down_date": 0.5}, low_rank=low_rank), UP)
    assert plan.method == Caldera(down_date=0.5)
    assert (plan.factor_formats, plan.factor_axes, plan.iterations) == ((MXInt(4), MXInt(8)), (0, 1), 20)
    other = plan_linear(config(low_rank={**low_rank, "format_b": "none"}), UP)
    assert (other.method, other.factor_b) == (LqerAct(), Passthrough("float16"))
    assert plan_linear(config(low_rank={"rank": 8, "format": "w4"}), UP).factor_formats == (MXInt(4), MXInt(4))
