from __future__ import annotations

import pytest

from lqer.report.naming import rtn_name, scheme_name, weights_name


@pytest.mark.parametrize(
    ("quantize", "name", "rtn"),
    [
        ({"method": {"kind": "none"}}, "RTN", "RTN"),
        ({"method": {"kind": "lqer-act"}, "rounding": {"kind": "nearest"}}, "lqer-act", "RTN"),
        ({"method": {"kind": "none"}, "rounding": {"kind": "gptq"}}, "gptq", "gptq"),
        ({"method": {"kind": "gptq"}}, "gptq", "gptq"),
        ({"method": {"kind": "gptq"}, "rounding": {"kind": "gptq"}}, "gptq", "gptq"),
        (
            {
                "method": {"kind": "qera-exact"},
                "rounding": {"kind": "adaptive"},
                "transforms": [{"kind": "awq"}, {"kind": "clip"}],
            },
            "awq + clip + adaptive + qera-exact",
            "awq + clip + adaptive",
        ),
    ],
)
def test_a_scheme_is_named_by_its_parts(quantize, name, rtn):
    assert (scheme_name(quantize), rtn_name(quantize)) == (name, rtn)


def test_under_a_budget_weights_are_named_by_the_formats_that_it_is_spent_on():
    quantize = {"weight": "w4", "widths": ["w2", "w3"]}
    assert weights_name(quantize) == "w4"
    assert weights_name(quantize | {"budget_bits": 2.5}) == "w2, w3"
