"""A number format that cannot be is refused with rule and value, by the formats and in a configuration."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from lqer.config.specs import FormatSpec
from lqer.formats import format_from_dict

REFUSED = [
    ({"kind": "mxint", "bits": 9}, "bits 9 is not in 2..8 (mxint)"),
    ({"kind": "int", "bits": 1}, "bits 1 is not in 2..8 (int)"),
    (
        {"kind": "mxint", "bits": 4, "block_size": 0},
        'block_size 0 is not "row", "tensor" or an integer of at least 1 (mxint)',
    ),
    ({"kind": "e8p", "bits": 5}, "bits 5 is not in 2..4 (e8p)"),
    (
        {"kind": "e8p", "bits": 2, "block_size": 12},
        "block_size 12 is not a multiple of 8 (e8p)",
    ),
    ({"kind": "e8p", "bits": 2, "opt_scale": 0.0}, "opt_scale 0.0 is not above 0 and up to 16 (e8p)"),
    ({"kind": "normal-float", "bits": 9}, "bits 9 is not in 2..8 (normal-float)"),
    ({"kind": "int", "bits": 4, "block_size": -1}, 'block_size -1 is not "row", "tensor" or an integer'),
]
REFUSED_BY_TYPE = [
    ({"kind": "int", "bits": 4, "block_size": "channel"}, 'block_size \'channel\' is not "row", "tensor" or'),
    ({"kind": "mxint", "bits": 4, "scale_rounding": "up"}, "scale_rounding 'up' is not one of 'ceil', 'floor' (mxint)"),
    (
        {"kind": "int", "bits": 4, "scale_dtype": "int8"},
        "scale_dtype 'int8' is not one of 'float16', 'bfloat16'",
    ),
    ({"kind": "mx", "element": "fp4"}, "element 'fp4' is not one of 'mxfp8_e4m3'"),
    ({"kind": "passthrough", "dtype": "float64"}, "dtype 'float64' is not one of"),
    ({"kind": "normal-float", "bits": 4, "nearest": "p"}, "nearest 'p' is not one of 'value', 'cdf' (normal-float)"),
    ({"kind": "e8p", "bits": 2, "scale_dtype": "int8"}, "scale_dtype 'int8' is not one of 'float16', 'bfloat16'"),
    ({"kind": "mxint"}, "missing 1 required positional argument: 'bits' (mxint)"),
    ({"kind": "mxint", "bits": 4, "group": 16}, "unknown key 'group' of number format \"mxint\""),
    ({"kind": "nf4"}, "unknown number format 'nf4'; allowed: "),
    ({"kind": "normal_float", "bits": 4}, "did you mean 'normal-float'?"),
    ({"bits": 4}, "a number format needs a kind; allowed: "),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED + REFUSED_BY_TYPE)
def test_a_format_that_cannot_be_is_refused_with_rule_and_value(fields, message):
    with pytest.raises(ValueError) as refusal:
        format_from_dict(fields)
    assert message in str(refusal.value)


class TestPydantic:
    adapter = TypeAdapter(FormatSpec)

    @pytest.mark.parametrize(("fields", "message"), REFUSED)
    def test_reports_the_formats_own_rules(self, fields, message):
        with pytest.raises(ValidationError) as refusal:
            self.adapter.validate_python(fields)
        assert message in str(refusal.value)

    @pytest.mark.parametrize("kind", ["mxint", "int", "mx", "passthrough", "e8p", "normal-float"])
    def test_refuses_an_unknown_key(self, kind):
        needed = {"mx": {"element": "mxint8"}, "passthrough": {}}.get(kind, {"bits": 4})
        with pytest.raises(ValidationError, match="group_size"):
            self.adapter.validate_python({"kind": kind, **needed, "group_size": 16})

    def test_refuses_an_unknown_kind(self):
        with pytest.raises(ValidationError, match="unknown number format 'nf4'; allowed: "):
            self.adapter.validate_python({"kind": "nf4"})
