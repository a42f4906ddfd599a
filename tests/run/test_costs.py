"""The order of methods by how long they take."""

from __future__ import annotations

import pytest

from lqer.config import read_config
from lqer.run.costs import OTHERWISE, quantization_minutes, takes_long

MINUTES = {"lqer-act": OTHERWISE, "gptq": 2.0, "gptvq": 3.0, "quip-sharp": 5.0, "caldera": 5.0, "tesseraq": 64.0}


@pytest.mark.parametrize("preset", MINUTES)
def test_slower_methods_cost_more(preset):
    minutes = quantization_minutes(read_config(f"preset:{preset}", "tag", ["--model=any"]).quantize)
    assert minutes == MINUTES[preset]


def test_a_linear_of_caldera_takes_long_in_a_model_of_405b_parameters_and_not_in_one_of_70b():
    assert takes_long(16384 * 53248, MINUTES["caldera"])
    assert not takes_long(8192 * 28672, MINUTES["caldera"])
    assert not takes_long(16384 * 53248, MINUTES["gptq"])
