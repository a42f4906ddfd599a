from __future__ import annotations

import pytest
from report_runs import FORMATS, quantize_table

from lqer.report import families
from lqer.report.families import CODEBOOK, FEEDBACK, LATTICE, LEARNED, LOW_RANK, OTHER, RTN, SCALING


def kinds(*names: str) -> list[dict[str, str]]:
    return [{"kind": name} for name in names]


@pytest.mark.parametrize(
    ("quantize", "family", "rtn"),
    [
        (quantize_table("none", rank=0), RTN, RTN),
        (quantize_table("lqer-act"), LOW_RANK, RTN),
        (quantize_table("lqer-act", rank=0), RTN, RTN),
        (quantize_table("gptq", "int3", 0), FEEDBACK, FEEDBACK),
        (quantize_table("qera-exact", rounding={"kind": "gptq"}), FEEDBACK, FEEDBACK),
        (quantize_table("gptvq", rank=0), CODEBOOK, CODEBOOK),
        (quantize_table("none", "int3", 0, transforms=kinds("awq", "clip")), SCALING, SCALING),
        (quantize_table("none", "int3", 0, transforms=kinds("awq"), rounding={"kind": "adaptive"}), LEARNED, LEARNED),
        (quantize_table("caldera", "e8p2", rounding={"kind": "ldlq"}), LATTICE, LATTICE),
        (quantize_table("none", rank=0, rounding={"kind": "of a plug-in"}), OTHER, OTHER),
    ],
)
def test_a_scheme_belongs_to_the_family_of_what_rounds_it(quantize, family, rtn):
    config = {"formats": FORMATS, "quantize": quantize}
    assert (families.family_of(config), families.rtn_family(config)) == (family, rtn)


def test_no_two_families_look_alike():
    for look in ("name", "colour", "marker", "symbol"):
        assert len({getattr(family, look) for family in families.FAMILIES}) == len(families.FAMILIES)
