"""The order of methods by how long they take."""

from __future__ import annotations

import pytest

from lqer.config import read_config
from lqer.run.costs import OTHERWISE, quantization_minutes

LEAST = {"lqer-act": OTHERWISE, "gptq": 3.0, "gptvq": 10.0, "quip-sharp": 20.0, "caldera": 80.0, "tesseraq": 100.0}


@pytest.mark.parametrize("preset", LEAST)
def test_slower_methods_cost_more(preset):
    minutes = quantization_minutes(read_config(f"preset:{preset}", "tag", ["--model=any"]).quantize)
    assert LEAST[preset] <= minutes < 2 * LEAST[preset]
