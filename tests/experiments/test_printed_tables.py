"""What a benchmark printed is kept cell by cell, and a page shows the file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_tables.printed import PRINTED as MARKED
from page_tables.printed import markdown, read, tables, take
from tables import filled

from lqer.errors import DataError

ROOT = Path(__file__).parents[2]
# All but the page that the code of the contract writes.
PAGES = sorted(page for page in (ROOT / "docs/results").glob("*.md") if page.stem != "contract")
PRINTED = """copy 4.1 TB/s
| rank | us, a \\| b |
|---|---:|
| 1 | **2.5** |
| 2 | |

| other |
|---|
| 7 |
seconds: 3
"""


def test_a_printed_table_comes_back_from_its_file(tmp_path):
    take(PRINTED, 1, tmp_path / "new" / "ranks.csv")
    assert read(tmp_path / "new" / "ranks.csv") == [["rank", "us, a \\| b"], ["1", "**2.5**"], ["2", ""]]
    shown = markdown(read(tmp_path / "new" / "ranks.csv"))
    assert shown.splitlines() == ["| rank | us, a \\| b |", "|---|---|", "| 1 | **2.5** |", "| 2 | |"]
    assert tables(shown) == tables(PRINTED)[:1]


def test_a_later_table_is_asked_for_by_its_number(tmp_path):
    take(PRINTED, 2, tmp_path / "other.csv")
    assert read(tmp_path / "other.csv") == [["other"], ["7"]]
    with pytest.raises(DataError, match="table 3: the text has 2 tables"):
        take(PRINTED, 3, tmp_path / "none.csv")


def test_the_command_takes_what_is_piped_into_it(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/tables.py"), "take", str(tmp_path / "t.csv"), "--table", "2"]
    subprocess.run(command, input=PRINTED, text=True, check=True, capture_output=True)
    assert read(tmp_path / "t.csv") == [["other"], ["7"]]


def test_a_page_shows_the_file_in_place_of_what_stood_there(tmp_path):
    take(PRINTED, 1, tmp_path / "ranks.csv")
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- printed ranks.csv -->\n| 1 | 9.9 |\n<!-- end of table -->\nAfter.\n")
    text = filled(page)
    assert "| 1 | **2.5** |" in text
    assert "9.9" not in text
    assert text.startswith("Before.\n<!-- printed ranks.csv -->\n\n| rank |")
    assert text.endswith("\n\n<!-- end of table -->\nAfter.\n")


def test_a_file_with_a_row_of_another_length_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(DataError, match="line 3 has 1 cells, the headings 2"):
        read(tmp_path / "t.csv")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_of_a_page_of_results_comes_from_a_file(page):
    # In a fence stands what its command printed.
    made = r"<!-- (printed|table) .*?<!-- end of table -->|^```.*?^```$"
    loose = re.sub(made, "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert tables(loose) == []


def test_every_file_of_printed_tables_is_shown():
    pages = (ROOT / "docs").rglob("*.md")
    shown = {(page.parent / found["file"]).resolve() for page in pages for found in MARKED.finditer(page.read_text())}
    assert shown == {path.resolve() for path in (ROOT / "docs/results/data").rglob("*.csv")}
