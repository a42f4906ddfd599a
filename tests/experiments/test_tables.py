"""Tables of pages are what their files of rows say, and rows are what runs measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from page_tables.rows import Row, merged, read_rows
from report_runs import quantize_table, run_results
from tables import filled, front, markdown

from lqer.errors import LqerError
from lqer.report.sweep import SweepRecord
from lqer.store.files import content_hash

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
DATA = sorted((ROOT / "docs/results/data").glob("*.json"))


def row(scheme: str, bits: float, perplexity: dict[str, float], **changes: object) -> Row:
    facts = {"model": "some", "kl": {}, "command": "run it", "hardware": "CPU", "date": "2026-11-28", "by": "ours"}
    return Row(**(facts | {"scheme": scheme, "bits": bits, "perplexity": perplexity} | changes))


ROWS = [
    row("original", 16, {"wiki": 5.0}, by="original"),
    row("two", 2.1, {"wiki": 9.0}),
    row("three", 3.1, {"wiki": 10.0, "c4": 12345.6}, kl={"wiki": 0.25}),
    row("them", 3.2, {"wiki": 7.0}, by="peer"),
]


ROWS_OF_FILE = json.dumps([one.model_dump(mode="json", exclude_none=True) for one in ROWS], indent=1)


def tables(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments/tables.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(ROWS_OF_FILE)
    path = tmp_path / "page.md"
    path.write_text("Before.\n<!-- table rows.json columns=scheme,bits -->\nstale\n<!-- end of table -->\nAfter.\n")
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_what_its_files_say(page):
    assert filled(page) == page.read_text()


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_every_row_of_a_file_can_be_repeated(path):
    rows = read_rows(path)
    assert len({(one.model, one.scheme) for one in rows}) == len(rows)
    assert all(re.search(r"experiments/|sweeps/|lqer sweep ", one.command) for one in rows)


def test_a_table_has_a_column_for_each_text_and_bold_values_on_the_front():
    assert markdown(ROWS, ["model", "scheme", "bits", "perplexity", "kl"]).splitlines() == [
        "| model | scheme | bits | wiki | c4 | KL wiki |",
        "|---|---|---|---|---|---|",
        "| some | original | 16 | 5.000 | | |",
        "| | two | 2.100 | **9.000** | | |",
        "| | three | 3.100 | 10.00 | 1.2e4 | 0.250 |",
        "| | them (theirs) | 3.200 | **7.000** | | |",
    ]


def test_a_preset_is_named_beside_the_rows_that_it_makes():
    rows = [row("two", 2.1, {}, minutes=1.25), row("three", 3.1, {}), row("two", 2.1, {}, by="peer")]
    assert markdown(rows, ["scheme", "preset", "minutes"], {"t*o": "best-2"}).splitlines()[2:] == [
        "| two | `best-2` | 1.25 |",
        "| three | | |",
        "| two (theirs) | | |",
    ]


def test_facts_that_no_row_has_take_no_column():
    rows = [row("two", 2.1, {}, accuracy=0.5123, accuracy_error=0.0123, gb=0.25), row("three", 3.1, {}, gb=1234.5)]
    columns = ["scheme", "accuracy", "minutes", "GB", "peak GB", "tokens/s"]
    assert markdown(rows, columns).splitlines() == [
        "| scheme | accuracy | GB |",
        "|---|---|---|",
        "| two | 0.512 ± 0.012 | 0.25 |",
        "| three | | 1234 |",
    ]


def test_a_run_without_texts_adds_what_it_measured_to_its_row():
    known = [row("original", 16, {"wiki": 5.0}, by="original"), row("two", 2.1, {"wiki": 9.0}, gb=0.5)]
    alone = [
        row("original", 16, {}, by="original", tokens_per_second=90.0, command="time it"),
        row("two", 2.1, {}, tokens_per_second=150.0, gb=0.6, command="time it"),
    ]
    original, two = merged(known, alone)
    assert (original.perplexity, original.command, original.tokens_per_second) == ({"wiki": 5.0}, "run it", 90.0)
    assert (two.perplexity, two.gb, two.command, two.tokens_per_second) == ({"wiki": 9.0}, 0.5, "run it", 150.0)


def test_nothing_is_on_the_front_before_its_rivals_are_measured():
    assert [one.scheme for one in front(ROWS, "perplexity", "wiki")] == ["two", "them"]
    assert list(front(ROWS, "perplexity", "c4")) == []


def test_another_model_is_no_rival():
    other = row("large", 2, {"wiki": 1.0}, model="other")
    assert [one.scheme for one in front([*ROWS, other], "perplexity", "wiki")] == ["two", "them", "large"]


def test_only_the_marked_region_of_a_page_changes(page):
    assert tables("check", page).returncode == 1
    assert tables("fill", page).returncode == 0
    text = page.read_text()
    assert text.startswith("Before.\n<!-- table rows.json columns=scheme,bits -->\n")
    assert text.endswith("<!-- end of table -->\nAfter.\n")
    assert "| [three](rows.json#L" in text
    assert "stale" not in text
    assert tables("check", page).returncode == 0


def test_rows_are_picked_by_patterns_and_sorted_by_bits(page):
    page.write_text('<!-- table rows.json columns=scheme scheme="t*" by=ours sort=bits -->\n<!-- end of table -->\n')
    lines = [line for line in filled(page).splitlines() if line.startswith("| [t")]
    assert [line.partition("]")[0] for line in lines] == ["| [three", "| [two"]


def test_a_scheme_links_to_the_command_of_its_row(page):
    number = int(re.search(r"\[three\]\(rows\.json#L(\d+)\)", filled(page))[1])
    lines = page.with_name("rows.json").read_text().splitlines()
    assert lines[number - 1].strip() == '"command": "run it",'
    assert '"three"' in "".join(lines[number - 12 : number])


def test_a_file_with_rows_on_one_line_is_refused(page):
    page.with_name("rows.json").write_text(json.dumps([one.model_dump(mode="json") for one in ROWS]))
    with pytest.raises(LqerError, match="its command on a line of its own"):
        filled(page)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("rows.json colums=bits", "unknown key 'colums'"),
        ("rows.json columns=bit", "unknown column 'bit'"),
        ("rows.json sort=scheme", "sort: must be bits"),
        ("rows.json scheme=nothing", "no row for the table"),
        ("rows.json preset=best-2", "preset: must have the form SCHEME=NAME"),
        ('rows.json preset="two=bets-2"', "preset:bets-2: no such preset"),
        ("nowhere.json", "No such file"),
    ],
)
def test_a_mistake_in_a_marker_is_one_line(page, arguments, told):
    page.write_text(f"<!-- table {arguments} -->\n<!-- end of table -->\n")
    with pytest.raises(LqerError, match=told):
        filled(page)
    done = tables("fill", page)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_file_with_a_misspelt_key_is_refused_by_name(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([ROWS[1].model_dump(mode="json") | {"bit": 2}]))
    with pytest.raises(LqerError, match=r"rows\.json: 0\.bit"):
        read_rows(tmp_path / "rows.json")


def test_a_new_row_takes_the_place_of_the_old_one():
    better = row("two", 2.1, {"wiki": 8.0})
    assert merged(ROWS, [better, row("four", 4.1, {})])[1] == better
    assert [one.scheme for one in merged(ROWS, [better, row("four", 4.1, {})])][-1] == "four"


def test_the_original_keeps_its_values_on_other_texts():
    (both,) = merged(ROWS[:1], [row("original", 16, {"c4": 8.0}, by="original")])
    assert both.perplexity == {"wiki": 5.0, "c4": 8.0}


RUN = {
    "tag": "mine",
    "device": "NVIDIA H100",
    "versions": {"torch": "2.11.0"},
    "bits": {"average": 3.12345},
    "config": {"quantize": {"method": {"kind": "lqer-act"}, "weight": "w3"}},
    "seconds": {"calibrate": 10.0, "quantize": 50.0, "finetune": 30.0},
    "perplexity": [
        {"dataset": "a.txt", "original": 5.0, "quantized": 6.123456, "divergence": {"quantized": {"kl_mean": 0.1}}},
        {"dataset": "b.txt", "original": 7.0, "quantized": None, "divergence": None},
    ],
}
PEER_LINE = {
    "peer": "hqq",
    "versions": {"hqq": "0.2.8", "torch": "2.11.0"},
    "device": "NVIDIA H100",
    "settings": {"bits": 2, "group_size": 64},
    "average_bits": 2.5,
    "texts": {"a.txt": {"perplexity": 9.0, "original": 5.0, "kl_mean": 0.5}},
}


def test_rows_are_added_from_runs_and_from_peers(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RUN))
    (tmp_path / "peers.jsonl").write_text(json.dumps(PEER_LINE) + "\n")
    data = tmp_path / "data.json"
    common = ("--model", "Some-1B", "--text", "a.txt=Wiki", "--date", "2026-11-28")
    done = tables("add", data, tmp_path / "results.json", *common, "--command", "sweeps/x.sh # {tag}")
    assert done.returncode == 0, done.stderr
    done = tables("add", data, tmp_path / "peers.jsonl", *common, "--command", "experiments/y.py")
    assert done.returncode == 0, done.stderr
    original, ours, theirs = read_rows(data)
    assert (original.by, original.bits, original.perplexity) == ("original", 16, {"Wiki": 5.0, "b.txt": 7.0})
    assert (ours.scheme, ours.bits, ours.command) == ("lqer-act, w3", 3.1235, "sweeps/x.sh # mine")
    assert (ours.perplexity, ours.kl) == ({"Wiki": 6.1235}, {"Wiki": 0.1})
    assert (ours.minutes, theirs.minutes) == (1.5, None)
    assert ours.hardware == "NVIDIA H100, torch 2.11.0"
    assert (theirs.by, theirs.scheme, theirs.kl) == ("peer", "hqq 0.2.8 int2 g64", {"Wiki": 0.5})


def test_a_run_that_measured_decode_speed_alone_adds_it_to_the_rows(tmp_path):
    speed = {"tokens_per_second": {"original": 300.0, "quantized": 512.3456}, "checkpoint_bytes": 5 * 10**8}
    (tmp_path / "results.json").write_text(json.dumps(RUN))
    (tmp_path / "alone.json").write_text(json.dumps(RUN | {"perplexity": []} | speed))
    data = tmp_path / "data.json"
    for name in ("results.json", "alone.json"):
        done = tables("add", data, tmp_path / name, "--model", "Some-1B", "--command", "sweeps/x.sh", "--scheme", "s")
        assert done.returncode == 0, done.stderr
    original, ours = read_rows(data)
    assert (original.tokens_per_second, original.perplexity) == (300, {"a.txt": 5.0, "b.txt": 7.0})
    assert (ours.tokens_per_second, ours.perplexity, ours.gb) == (512.35, {"a.txt": 6.1235}, None)


def test_a_run_that_found_every_stage_done_has_no_peak_of_its_own(tmp_path):
    resumed = tmp_path / "results.json"
    resumed.write_text(json.dumps(RUN | {"peak_memory_bytes": 0, "checkpoint_bytes": 5 * 10**8}))
    data = tmp_path / "data.json"
    done = tables("add", data, resumed, "--model", "Some-1B", "--command", "sweeps/x.sh", "--scheme", "s")
    assert done.returncode == 0, done.stderr
    assert [(row.peak_gb, row.gb) for row in read_rows(data) if row.scheme == "s"] == [(None, 0.5)]


def test_a_sweep_gives_a_row_for_each_finished_run(tmp_path):
    rounded = run_results("big-rounded", 3.25, {"a.txt": 8.0})
    plain = run_results("big-plain", 4.0, {"a.txt": 7.0}, quantize=quantize_table("none", "int3", 0, activation="none"))
    runs = {}
    for results in (rounded, plain):
        results |= {key: results[key] | RUN[key] for key in ("seconds", "versions")}
        (tmp_path / results["tag"]).mkdir()
        (tmp_path / results["tag"] / "results.json").write_text(json.dumps(results))
        facts = {"tag": results["tag"], "extends": [], "scheme": {}, "config": content_hash(results["config"])}
        runs[results["tag"].removeprefix("big-")] = facts
    runs["missing"] = {"tag": "big-missing", "extends": [], "scheme": {}, "config": ""}
    record = SweepRecord("atlas", "some.toml", "big", "lqer sweep atlas some.toml big", runs)
    (tmp_path / "big-table").mkdir()
    (tmp_path / "big-table/sweep.json").write_text(json.dumps(asdict(record)))
    data = tmp_path / "data.json"
    done = tables("add-sweep", data, tmp_path / "big-table", "--model", "Some-1B", "--text", "a.txt=Wiki")
    assert done.returncode == 0, done.stderr
    original, *rows = read_rows(data)
    assert (original.by, original.perplexity) == ("original", {"Wiki": 5.0})
    assert [(one.scheme, one.bits, one.activations, one.perplexity["Wiki"]) for one in rows] == [
        ("rounded", 3.25, "x8", 8.0),
        ("plain", 4.0, "", 7.0),
    ]
    assert rows[0].command == "lqer sweep atlas some.toml big --only rounded"
    assert (rows[0].family, rows[1].family) == ("low-rank factors", "round to nearest")
    page = tmp_path / "page.md"
    page.write_text('<!-- table data.json columns=scheme activations="" -->\n<!-- end of table -->\n')
    assert "plain" in filled(page)
    assert "rounded" not in filled(page)


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    done = tables("add-sweep", tmp_path / "data.json", tmp_path, "--model", "M")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "sweep.json" in done.stderr


def test_what_is_no_result_is_refused_by_name(tmp_path):
    (tmp_path / "other.json").write_text('{"some": "thing"}')
    done = tables("add", tmp_path / "data.json", tmp_path / "other.json", "--model", "M", "--command", "C")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'other.json'}: neither results.json")
    assert not (tmp_path / "data.json").exists()
