"""The picture of a leaderboard is that of the rows in its files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from page_tables.rows import ROWS as ADAPTER
from page_tables.rows import Row
from row_picture import draw, drawn_from, family, fingerprint

from lqer.errors import DataError
from lqer.report.families import FEEDBACK, LATTICE, LOW_RANK, OTHER

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
COMMAND = re.compile(r"python experiments/row_picture\.py [^\n`]+")
COMMANDS = [command for page in PAGES for command in COMMAND.findall(page.read_text())]


def row(scheme: str, bits: float, perplexity: float, by: str = "ours", model: str = "Some-1B") -> Row:
    facts = {"command": "run it", "hardware": "CPU", "date": "2026-11-28", "perplexity": {"wiki": perplexity}}
    return Row(model=model, scheme=scheme, bits=bits, by=by, **facts)


ROWS = [
    row("original", 16, 10.0, by="original"),
    row("trellis, 2 bits", 2.0, 20.0),
    row("GPTQ, int3 g64", 3.3, 15.0),
    row("HQQ 0.2.8, int2", 2.5, 900.0, by="peer"),
    row("trellis, 2 bits", 2.0, 30.0, model="Other-2B"),
]
ROWS_OF_FILE = ADAPTER.dump_json(ROWS, indent=1, exclude_none=True).decode()


def test_the_picture_holds_a_hash_of_what_it_was_drawn_from(tmp_path):
    path = tmp_path / "figures/picture.png"
    draw(path, ROWS, ["wiki"])
    assert path.stat().st_size > 10_000
    assert drawn_from(path) == fingerprint(ROWS, ["wiki"])
    assert fingerprint(ROWS, ["wiki"]) != fingerprint(ROWS[:-1], ["wiki"])


def test_a_text_that_no_row_has_is_refused(tmp_path):
    with pytest.raises(DataError, match="no row has a perplexity on c4"):
        draw(tmp_path / "picture.png", ROWS, ["c4"])


def test_colours_are_those_of_families():
    assert [family(one) for one in ROWS[1:4]] == [LATTICE, FEEDBACK, OTHER]
    assert family(ROWS[1].model_copy(update={"family": LOW_RANK.name})) is LOW_RANK


def test_names_of_other_libraries_leave_each_other_room(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("row_picture.plt.close", figures.append)
    peers = [
        row("GPTQ of llm-compressor 0.14", 4.0, 10.8, by="peer"),
        row("AWQ of llm-compressor 0.14", 4.0, 10.9, by="peer"),
    ]
    draw(tmp_path / "picture.png", [*ROWS, *peers], ["wiki"])
    # Places were last those of the saved file, which has more dots an inch.
    figures[0].draw_without_rendering()
    names = {one.get_text(): one.get_window_extent() for one in figures[0].axes[0].texts}
    assert names["AWQ"].y0 > names["GPTQ"].y0
    assert not names["AWQ"].overlaps(names["GPTQ"])


def test_rows_that_round_activations_are_left_out(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("row_picture._panel", lambda axis, rows, text, names: drawn.append((text, len(rows))) or [])
    rounded = ROWS[1].model_copy(update={"activations": "x8"})
    draw(tmp_path / "picture.png", [ROWS[0], rounded, *ROWS[2:4]], ["wiki"])
    assert drawn == [("wiki", 3)]


def test_a_picture_of_one_model_has_no_panel_of_others(tmp_path):
    (tmp_path / "rows.json").write_text(ROWS_OF_FILE)
    command = [sys.executable, ROOT / "experiments/row_picture.py", tmp_path / "picture.png", tmp_path / "rows.json"]
    subprocess.run([*command, "--text", "wiki", "--model", "Other-2B"], check=True)
    assert drawn_from(tmp_path / "picture.png") == fingerprint(ROWS[-1:], ["wiki"])


def test_the_pages_show_pictures():
    assert len(COMMANDS) >= 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_picture_of_a_page_is_drawn_from_the_files_of_its_command(command):
    done = subprocess.run([sys.executable, *shlex.split(command)[1:], "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, f"drawn from other rows; draw it anew: {command}"
