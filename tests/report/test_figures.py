from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from report_runs import text_row

from lqer.report import figures
from lqer.report.families import FEEDBACK, LOW_RANK, RTN


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that would be written."""
    kept: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))
    return kept


def points(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["method", "family", "bits", "perplexity"])
    return table.assign(rtn_method="RTN", rtn_family=RTN.name, rtn_bits=3.0, rtn=9.0, original=4.0)


def test_every_text_has_a_scale_of_its_own_and_bars_in_the_colours_of_their_families(saved, tmp_path):
    rows = [text_row("wikitext2", 6.0, 8.0), text_row("a text of another language and a long name", 6000.0, 8000.0)]
    names = {"original": "original", "rtn": "RTN", "quantized": "lqer-act"}
    families = {"rtn": RTN, "quantized": LOW_RANK}
    figures.save_perplexities(tmp_path / "a.png", rows, names, {"quantized": 4.5}, families)
    first, second = saved[0].axes
    assert first.get_ylim()[1] < 10 < 8000 < second.get_ylim()[1]
    colours = [to_hex(bar.get_facecolor()).upper() for bar in first.patches]
    assert colours == [figures.ORIGINAL_COLOUR, RTN.colour, LOW_RANK.colour]


def test_a_scheme_and_its_own_baseline_of_one_family_are_told_apart_by_hatching(saved, tmp_path):
    names, families = {"rtn": "gptq", "quantized": "gptq + qera-exact"}, {"rtn": FEEDBACK, "quantized": FEEDBACK}
    figures.save_perplexities(tmp_path / "a.png", [text_row("wikitext2", 6.0, 8.0)], names, {}, families)
    without, with_factors = saved[0].axes[0].patches
    assert (without.get_hatch(), with_factors.get_hatch()) == ("//", None)


def test_the_points_of_a_front_are_named_where_nothing_is_covered(saved, tmp_path):
    table = points(
        ("lqer-act", LOW_RANK.name, 4.0, 6.0), ("gptq", FEEDBACK.name, 5.0, 5.0), ("lqer-svd", LOW_RANK.name, 5.5, 7.0)
    )
    figures.save_pareto(tmp_path / "a.png", table, "title")
    texts = saved[0].axes[0].texts
    assert {text.get_text() for text in texts} == {"RTN", "lqer-act", "gptq"}
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_name_without_room_is_left_out(saved, tmp_path):
    crowd = [(f"scheme {i}", LOW_RANK.name, 4.0 + 1e-4 * i, 6.0 - 1e-4 * i) for i in range(12)]
    figures.save_pareto(tmp_path / "a.png", points(*crowd), "title")
    assert len(saved[0].axes[0].texts) < 13
