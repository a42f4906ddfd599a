from __future__ import annotations

import pytest

from lqer.report.naming import plain_name, scheme_name


@pytest.mark.parametrize(
    ("quantize", "name", "plain"),
    [
        ({"method": "none"}, "RTN", "RTN"),
        ({"method": "lqer-act", "rounding": {"kind": "nearest"}}, "lqer-act", "RTN"),
        ({"method": "none", "rounding": {"kind": "gptq"}}, "gptq", "gptq"),
        (
            {
                "method": "qera-exact",
                "rounding": {"kind": "adaptive"},
                "transforms": [{"kind": "awq"}, {"kind": "clip"}],
            },
            "awq + clip + adaptive + qera-exact",
            "awq + clip + adaptive",
        ),
    ],
)
def test_a_scheme_is_named_by_its_parts(quantize, name, plain):
    assert (scheme_name(quantize), plain_name(quantize)) == (name, plain)
