"""Runs merged into one table, and the front of those that no other beats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from report_runs import run_results

from lqer.errors import DataError
from lqer.report.collect import collect, write_collection, write_page
from lqer.report.figures import pareto_front
from lqer.results import SCHEMA_VERSION

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, tag: str, bits: float, perplexities: dict[str, float], plain: float | None = None) -> None:
    (folder / tag).mkdir()
    (folder / tag / "results.json").write_text(json.dumps(run_results(tag, bits, perplexities, plain)))


def test_every_run_and_text_is_one_row_sorted_by_bits(tmp_path):
    write_run(tmp_path, "large", 5.2, {"wikitext2": 5.4, "c4": 7.1})
    write_run(tmp_path, "small", 3.1, {"wikitext2": 6.5})
    table = collect(tmp_path)
    rows = list(zip(table["dataset"], table["tag"], table["perplexity"], strict=True))
    assert rows == [("c4", "large", 7.1), ("wikitext2", "small", 6.5), ("wikitext2", "large", 5.4)]


def test_runs_are_picked_by_tag(tmp_path):
    write_run(tmp_path, "sweep-a", 5, {"c4": 7})
    write_run(tmp_path, "other", 5, {"c4": 7})
    assert list(collect(tmp_path, "sweep-*")["tag"]) == ["sweep-a"]


def test_no_run_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        collect(tmp_path)


def test_a_run_of_another_schema_is_refused_by_name(tmp_path):
    write_run(tmp_path, "old", 5, {"c4": 7})
    path = tmp_path / "old" / "results.json"
    path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 0'))
    with pytest.raises(DataError, match=r"old/results\.json: schema_version 0"):
        collect(tmp_path)


def test_table_and_one_plot_per_text_are_written(tmp_path):
    write_run(tmp_path, "a", 5, {"wikitext2": 5.4, "c4": 7.1}, plain=9)
    write_run(tmp_path, "b", 4, {"wikitext2": 6.4})
    paths = write_collection(collect(tmp_path), tmp_path / "out")
    names = {path.name for path in paths}
    assert {"results.csv", "results.md"} < names
    assert {name for name in names if name.endswith(".png")} == {
        "pareto-model-wikitext2-concat-2048.png",
        "pareto-model-c4-concat-2048.png",
    }
    assert all(path.stat().st_size > 0 for path in paths)
    assert list(pd.read_csv(tmp_path / "out" / "results.csv")["tag"]) == list(collect(tmp_path)["tag"])


def test_the_page_links_to_the_pages_of_its_runs_from_where_it_is(tmp_path):
    for tag in ("with page", "without"):
        write_run(tmp_path, tag, 5, {"c4": 7.1})
    (tmp_path / "with page" / "report.html").touch()
    page = write_page(tmp_path, "*", tmp_path / "out" / "deeper").read_text()
    assert '<a href="../../with%20page/report.html">with page</a>' in page
    assert "without/report.html" not in page


def test_the_front_holds_exactly_what_no_other_point_beats():
    points = pd.DataFrame({"bits": [3, 4, 4, 5, 6, 7], "perplexity": [9.0, 7.0, 8.0, 7.5, 6.0, 6.0]})
    front = pareto_front(points)
    assert list(zip(front["bits"], front["perplexity"], strict=True)) == [(3, 9.0), (4, 7.0), (6, 6.0)]


def test_the_script_prints_the_table_and_answers_a_mistake_with_status_2(tmp_path):
    write_run(tmp_path, "a", 5, {"c4": 7.1})
    command = [sys.executable, str(ROOT / "experiments/collect_results.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| a | model | lqer-act | low-rank factors | w4 |" in done.stdout
    assert (tmp_path / "table" / "report.html").exists()
    wrong = subprocess.run([*command, "--match", "nothing"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: no results.json")
