"""report.html in a real browser, on a phone's width and a desktop's, light and dark.

Needs a Chromium on the PATH; Debian's package is called chromium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from report_runs import layers_table, quantize_table, run_results, spectra

from lqer.report.page.write import Details, write_collection_page, write_run_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

POINTS = "#pareto .scatterlayer .points path"
HOVER = "#pareto .hoverlayer .hovertext"
HOSTILE = "<img src=x onerror=console.error('hacked')>{{7*7}}<b>bold</b>"
WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}


@dataclass
class Opened:
    """A page in the browser, with what it must not do: errors on the console, and requests."""

    page: Any
    width: int
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def cells(self, column: int) -> list[str]:
        """The first line of every visible cell of a column of the table of runs."""
        rows = self.page.locator("#runs tbody tr:visible").all()
        return [row.locator("td").nth(column).inner_text().split("\n")[0].strip() for row in rows]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        run_results("low", 5.0, {"c4": 6.0, "wikitext2": 5.5}, plain=9.0),
        run_results("plain", 4.2, {"c4": 8.5, "wikitext2": 7.5}, None, quantize_table("none", "int3", 0)),
        run_results(HOSTILE, 3.1, {"c4": 30.0, "wikitext2": 25.0}, None, quantize_table("gptq", "int3", 0)),
        run_results("two-bit", 2.2, {"c4": 40.0}, None, quantize_table("caldera", "e8p2", 16)),
    ]
    write_collection_page(folder / "collection.html", runs, HOSTILE)
    write_run_page(folder / "run.html", runs[0], Details(layers_table(), [[2.0, 1.0, 0.5]] * 4, spectra()))
    return folder


@pytest.fixture(
    scope="module", params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")], ids="-".join
)
def screen(request, browser) -> Iterator[Any]:
    """Opens pages on a screen of one width and scheme."""
    width, scheme = request.param
    opened: list[Opened] = []

    def open_page(path: Path) -> Opened:
        size = dict(zip(("width", "height"), WIDTHS[width]))
        page = browser.new_page(viewport=size, color_scheme=scheme)
        one = Opened(page, size["width"])
        page.on("console", lambda message: one.complaints.append(message.text))
        page.on("pageerror", lambda error: one.complaints.append(str(error)))
        page.on("request", lambda sent: one.requests.append(sent.url))
        page.goto(path.as_uri())
        page.wait_for_selector(POINTS)
        opened.append(one)
        return one

    yield open_page
    for one in opened:
        one.page.close()


@pytest.fixture(scope="module")
def opened_collection(screen, pages) -> Opened:
    return screen(pages / "collection.html")


@pytest.fixture(scope="module")
def opened_run(screen, pages) -> Opened:
    return screen(pages / "run.html")


@pytest.fixture
def collection(opened_collection) -> Iterator[Opened]:
    """The page of a collection, as it is when it was just opened but for the order of its rows."""
    opened_collection.page.select_option("#measure", index=0)
    opened_collection.page.fill("[data-filters=runs]", "")
    yield opened_collection
    check(opened_collection)


@pytest.fixture
def run(opened_run) -> Iterator[Opened]:
    yield opened_run
    check(opened_run)


def check(opened: Opened) -> None:
    """Nothing was complained of or fetched, and nothing is wider than the screen but what scrolls by itself."""
    assert not opened.complaints
    assert not [url for url in opened.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= opened.width


def box_of(opened: Opened, selector: str) -> tuple[float, float]:
    """The left and right end of an element."""
    box = opened.page.locator(selector).first.bounding_box()
    return box["x"], box["x"] + box["width"]


def test_every_point_tells_of_its_scheme_within_the_screen(collection):
    points = collection.page.locator(POINTS)
    assert points.count() == 5
    for place in range(points.count()):
        points.nth(place).hover(force=True)
        collection.page.wait_for_selector(HOVER)
        left, right = box_of(collection, HOVER)
        assert left >= 0
        assert right <= collection.width


def test_a_click_on_a_point_lists_its_bits_and_the_command(collection):
    # The topmost family of the chart is drawn last: lattices.
    collection.page.locator(POINTS).last.click(force=True)
    text = collection.page.locator("#selected").inner_text()
    assert "caldera" in text
    assert "A and B" in text
    assert "lqer run checkpoints/two-bit/config.toml" in text
    assert collection.page.locator("#runs tr.marked").count() == 1


def test_the_table_sorts_both_ways_with_missing_values_last(collection):
    collection.page.select_option("#measure", label="perplexity, wikitext2 (concat, seq_len 2048, 1000 tokens)")
    header = collection.page.locator("#runs th.measure.chosen button")
    column = header.evaluate("button => [...button.closest('tr').children].indexOf(button.closest('th'))")
    header.click()
    assert collection.cells(column) == ["5.5", "7.5", "9", "25", "–"]
    header.click()
    assert collection.cells(column) == ["25", "9", "7.5", "5.5", "–"]


def test_the_table_shows_only_what_has_all_words_of_the_filter(collection):
    collection.page.fill("[data-filters=runs]", "LQER low")
    assert collection.cells(0) == ["lqer-act + fine-tuning"]
    assert collection.page.locator("[data-counts=runs]").inner_text() == "1 of 5"


def test_only_runs_of_the_model_of_the_measure_are_listed(screen, tmp_path):
    runs = [
        run_results(f"{model} {text}", 5.0, {text: 6.0}, None, model=model) for model in "ab" for text in ("c4", "x")
    ]
    write_collection_page(tmp_path / "models.html", runs, "two models")
    opened = screen(tmp_path / "models.html")
    opened.page.select_option("#measure", label="b: perplexity, x (concat, seq_len 2048, 1000 tokens)")
    assert opened.cells(0) == ["lqer-act + fine-tuning"] * 2
    assert opened.page.locator("[data-counts=runs]").inner_text() == "2 of 2"
    check(opened)


def test_another_measure_moves_the_points(collection):
    collection.page.select_option("#measure", label="top-1 agreement, c4 (concat, seq_len 2048, 1000 tokens)")
    assert collection.page.locator("#pareto .ytitle").text_content() == "top-1 agreement"
    assert collection.page.locator("#direction").inner_text().startswith("Higher is better")


def test_the_axis_of_bits_can_be_exchanged_for_the_size(screen, tmp_path):
    run = {**run_results("a", 5.0, {"c4": 6.0}, None), "checkpoint_bytes": 750_000_000}
    write_collection_page(tmp_path / "sizes.html", [run], "a run")
    opened = screen(tmp_path / "sizes.html")
    opened.page.select_option("#cost", index=1)
    assert opened.page.locator("#pareto .xtitle").text_content() == "size of the checkpoint, GB"
    opened.page.locator("#runs tbody tr").first.click()
    assert "0.7500 GB" in opened.page.locator("#selected").inner_text()
    check(opened)


def test_a_hostile_name_is_shown_as_it_is(collection):
    assert collection.page.locator("h1").inner_text() == HOSTILE
    collection.page.locator(f"{POINTS}").nth(3).hover(force=True)
    assert collection.page.locator("img").count() == 0


def test_the_page_of_a_run_draws_every_section(run):
    for chart in ("linears", "losses", "finetuning", "spectra"):
        assert run.page.locator(f"#{chart} .cartesianlayer .subplot").count() == 1
    run.page.select_option("[data-chart=linears]", label="bits per weight")
    run.page.locator("#linears .nsewdrag").first.hover()
    assert "bits" in run.page.locator("#linears .hovertext").first.text_content()
    run.page.locator("summary").click()
    run.page.fill("[data-filters=layers]", "layers.3 down")
    assert run.page.locator("#layers tbody tr:visible").count() == 1


def test_ink_stands_out_from_the_paper(run):
    """Axis labels are dark on light paper and light on dark paper."""
    script = """() => {
        const green = (colour) => Number(colour.match(/[0-9.]+/g)[1]) / 255;
        const ink = getComputedStyle(document.querySelector("#pareto .xtick text")).fill;
        return Math.abs(green(ink) - green(getComputedStyle(document.body).backgroundColor));
    }"""
    assert run.page.evaluate(script) > 0.6


def test_the_charts_follow_when_the_reader_changes_the_scheme(run):
    ink = "() => getComputedStyle(document.querySelector('#spectra .xtick text')).fill"
    inks = []
    for scheme in ("light", "dark"):
        run.page.emulate_media(color_scheme=scheme)
        run.page.wait_for_timeout(200)
        inks.append(run.page.evaluate(ink))
    assert inks == ["rgb(27, 30, 36)", "rgb(231, 233, 237)"]
