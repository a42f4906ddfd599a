"""report.html is one file that needs nothing else, says what results.json says, and takes names for text only."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from report_runs import layers_table, quantize_table, run_results, spectra

from lqer.report.page.write import Details, breakable, shown_number, write_collection_page, write_run_page

HOSTILE = "</script><script>hacked()</script><img src=x onerror=hacked()>\u2028\"'&{{7*7}}"
DETAILS = Details(layers_table(), [[2.0, 1.0]] * 4, spectra())


class Elements(HTMLParser):
    """The elements of a page, with the text of its JSON."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.json = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        element, attributes = self.found[-1] if self.found else ("", {})
        if attributes.get("id") == "data":
            self.json += data
        elif element not in ("script", "style"):
            self.text += data


def test_a_page_needs_nothing_but_itself(tmp_path):
    write_run_page(tmp_path / "report.html", run_results("a", 5.0, {"c4": 6.0}, plain=9.0), DETAILS)
    page = Elements((tmp_path / "report.html").read_text())
    assert not [found for found in page.found if found[0] == "script" and "src" in found[1]]
    assert not [found for found in page.found if found[0] == "link" and found[1]["href"] != "data:,"]
    (policy,) = [attributes["content"] for tag, attributes in page.found if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'")


def test_the_same_results_make_the_same_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        write_run_page(tmp_path / name, run_results("a", 5.0, {"c4": 6.0}, plain=9.0), DETAILS)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_page_of_a_run_has_a_chart_for_everything_it_measured(tmp_path):
    results = run_results("a", 5.0, {"c4": 6.0})
    write_run_page(tmp_path / "report.html", results, DETAILS)
    sections = json.loads(Elements((tmp_path / "report.html").read_text()).json)["sections"]
    assert {one["id"]: len(one["charts"]) for one in sections} == {
        "linears": 5, "losses": 1, "finetuning": 1, "spectra": 3,
    }  # fmt: skip


def test_the_page_of_a_run_says_what_it_lacks_by_leaving_it_out(tmp_path):
    results = run_results("a", 4.0, {}, None, quantize_table("none", rank=0))
    results["finetune"] = None
    results["warnings"] = ["the perplexity of the quantized model on c4 is not finite"]
    write_run_page(tmp_path / "report.html", results, Details(layers_table()))
    page = Elements((tmp_path / "report.html").read_text())
    assert [one["id"] for one in json.loads(page.json)["sections"]] == ["linears"]
    assert "Nothing was evaluated." in page.text
    assert "the perplexity of the quantized model on c4 is not finite" in page.text


def test_numbers_of_a_collection_are_those_of_its_runs(tmp_path):
    runs = [run_results("a", 5.0, {"c4": 6.0}, plain=9.0), run_results("b", 4.2, {"c4": 8.5})]
    write_collection_page(tmp_path / "report.html", runs, "two runs")
    page = (tmp_path / "report.html").read_text()
    cells = re.findall(r'data-measure="0" data-sort="([\d.]*)"', page)
    # By bits; the baseline of b was not evaluated.
    assert cells == ["8.5", "9.0", "6.0"]


def test_a_baseline_that_two_runs_share_is_one_row(tmp_path):
    runs = [run_results(tag, 5.0, {"c4": value}, plain=9.0) for tag, value in (("a", 6.0), ("b", 6.5))]
    write_collection_page(tmp_path / "report.html", runs, "two runs")
    data = json.loads(Elements((tmp_path / "report.html").read_text()).json)
    assert [one["scheme"] for one in data["candidates"]] == ["RTN", *["lqer-act + fine-tuning"] * 2]


@pytest.mark.parametrize("where", ["tag", "model", "dataset", "weight", "linear", "warning"])
def test_a_hostile_name_is_only_text(tmp_path, where):
    results = run_results("a", 5.0, {"c4": 6.0}, plain=9.0)
    layers = layers_table()
    if where == "tag":
        results["tag"] = results["config"]["tag"] = HOSTILE
    elif where == "model":
        results["model"]["name"] = results["model"]["description"] = HOSTILE
    elif where == "dataset":
        results["perplexity"][0]["dataset"] = results["perplexity"][0]["source"] = HOSTILE
    elif where == "weight":
        results["config"]["quantize"]["weight"] = HOSTILE
    elif where == "linear":
        layers["name"] = layers["name"].str.replace("up_proj", HOSTILE)
    else:
        results["warnings"] = [HOSTILE]
    write_run_page(tmp_path / "run.html", results, Details(layers))
    write_collection_page(tmp_path / "collection.html", [results], HOSTILE, {results["tag"]: "x.html"})
    for name in ("run.html", "collection.html"):
        page = (tmp_path / name).read_text()
        assert "<script>hacked" not in page
        found = Elements(page)
        assert not [element for element in found.found if element[0] == "img" or "onerror" in element[1]]
        assert [element[0] for element in found.found].count("script") == 3
        # Plotly makes elements of tags in the texts of a chart.
        data = json.loads(found.json)
        assert "<" not in re.sub("<br>|<extra></extra>", "", json.dumps([data["pareto"], data["sections"]]))


def test_a_scheme_with_a_run_of_its_own_is_not_shown_as_the_baseline_of_another(tmp_path):
    own = run_results("own", 4.5, {"c4": 9.0}, None, quantize_table("none", rank=0))
    own["finetune"] = own["perplexity"][0]["divergence"] = None
    other = run_results("other", 5.0, {"c4": 6.0}, plain=9.0)
    write_collection_page(tmp_path / "report.html", [other, own], "two runs")
    data = json.loads(Elements((tmp_path / "report.html").read_text()).json)
    assert [(one["scheme"], one["tag"]) for one in data["candidates"]] == [
        ("RTN", "own"),
        ("lqer-act + fine-tuning", "other"),
    ]


def test_a_long_name_breaks_after_punctuation_and_stays_text():
    assert breakable("c4.jsonl[:40]<b>") == "c4.<wbr>jsonl<wbr>[:<wbr>40]&lt;b&gt;"


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (float("nan"), "–"), (6.68317, "6.6832"), (127431.2, "127431"), (32, "32")]
)
def test_numbers_are_shown_without_exponents_and_missing_ones_as_a_dash(value, shown):
    assert shown_number(value) == shown
