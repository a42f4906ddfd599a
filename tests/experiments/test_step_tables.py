"""A table of steps shows what two rows say, and where they are."""

from __future__ import annotations

import json

import pytest
from page_tables.steps import read
from tables import filled

from lqer.errors import DataError

WITHOUT, WITH = "GPTQ, int3 g64", "GPTQ, int3 g64, R"
STEP = {"part": "R", "model": "small", "file": "../rows.json", "without": WITHOUT, "with_part": WITH}


def row(scheme: str, perplexity: float, **facts: object) -> dict[str, object]:
    measured = {"bits": 3.3, "perplexity": {"WikiText-2": perplexity, "C4": 20.0}, **facts}
    command = {"command": "lqer run", "hardware": "a GPU", "date": "2026-11-28", "by": "ours"}
    return {"model": "small", "scheme": scheme, **measured, **command}


@pytest.fixture
def page(tmp_path):
    rows = [row(WITHOUT, 40.0, kl={"WikiText-2": 0.5}), row(WITH, 30.0, kl={"WikiText-2": 0.25})]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps/steps.json").write_text(json.dumps([STEP, STEP]))
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- steps steps/steps.json -->\nold\n<!-- end of table -->\nAfter.\n")
    return page


def test_a_step_shows_both_rows_and_the_change(page):
    lines = filled(page).splitlines()
    assert "old" not in lines
    line = next(line for line in lines if line.startswith("| R |"))
    assert "| small | 40.00 to 30.00 (-25.0 %) | 20.00 to 20.00 (+0.0 %) | 0.500 to 0.250 (-50.0 %) |" in line


@pytest.mark.parametrize(("hardware", "shown"), [("a GPU", "| 1 to 1.5 |"), ("another", "| |")])
def test_minutes_of_one_session_are_compared(page, hardware, shown):
    rows = [row(WITHOUT, 40.0, minutes=1.0), row(WITH, 30.0, minutes=1.5) | {"hardware": hardware}]
    (page.parent / "rows.json").write_text(json.dumps(rows, indent=1))
    assert f"{shown} [without]" in filled(page)


def test_rows_are_linked_by_the_lines_of_their_commands(page):
    lines = (page.parent / "rows.json").read_text().splitlines()
    first, second = (number for number, line in enumerate(lines, 1) if "command" in line)
    assert filled(page).count(f"[without](rows.json#L{first}), [with](rows.json#L{second})") == 2


def test_a_part_is_named_in_the_first_of_its_steps(page):
    assert filled(page).count("| R |") == 1


def test_a_step_whose_row_is_missing_is_refused(page):
    (page.parent / "steps/steps.json").write_text(json.dumps([STEP | {"with_part": "GPTQ, int3 g64, Q"}]))
    with pytest.raises(DataError, match=r"R: ../rows.json has no row 'GPTQ, int3 g64, Q' of small"):
        filled(page)


def test_what_is_no_step_is_refused(page):
    (page.parent / "steps/steps.json").write_text(json.dumps([STEP | {"seconds": 3}]))
    with pytest.raises(DataError, match="seconds"):
        read(page.parent / "steps/steps.json")
