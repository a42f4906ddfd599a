"""What a run is said to have of a published figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import layers_table, run_results

from lqer.config import read_config
from lqer.errors import ConfigError
from lqer.report.published import figures_of
from lqer.report.write import render_report

PAPER = Path(__file__).parents[2] / "configs/paper"


def published(**changes: Any) -> dict[str, Any]:
    stated = {"source": "a table", "tolerance": 0.02, "text": "wikitext2", "perplexity": {"Small-1B": 8.0}}
    return stated | {"accuracy": {}} | changes


def run(measured: float | None, evaluation: dict[str, Any] | None = None, **changes: Any) -> Any:
    found = run_results("mine", 4.0, {"wikitext2": measured}, model="/models/Small-1B")
    found["config"] |= {"published": published(**changes), "evaluation": evaluation or {"perplexity": {}}}
    return found


@pytest.mark.parametrize(
    ("measured", "is_met", "told"),
    [
        (8.0, True, "this run has 8, 0.0% better. Met: a run may be 2% worse."),
        (8.15, True, "this run has 8.15, 1.9% worse. Met"),
        (8.17, False, "this run has 8.17, 2.1% worse. **Not met**"),
        (7.2, True, "this run has 7.2, 10.0% better. Met"),
        (None, None, "Not comparable: this run has no finite value of it."),
    ],
)
def test_a_run_meets_a_perplexity_that_it_is_worse_than_by_at_most_the_tolerance(measured, is_met, told):
    (figure,) = figures_of(run(measured))
    assert figure.is_met is is_met
    assert "Published: perplexity on wikitext2 8 (a table)" in str(figure)
    assert told in str(figure)


def test_a_run_on_a_part_of_the_text_is_not_compared():
    (figure,) = figures_of(run(8.0, {"perplexity": {"max_windows": 4}}))
    assert figure.is_met is None
    assert "`evaluation.perplexity.max_windows` leaves out a part" in str(figure)


def test_a_lower_accuracy_is_worse():
    tasks = [{"task": "piqa", "metric": "acc", "original": None, "rtn": None, "quantized": 0.45, "stderr": None}]
    found = run(8.0, {"downstream": {}}, perplexity={}, accuracy={"Small-1B": 0.5}) | {"downstream": tasks}
    (figure,) = figures_of(found)
    assert (figure.excess, figure.is_met) == (pytest.approx(0.1), False)


def test_nothing_is_said_of_a_model_without_a_figure():
    assert list(figures_of(run(8.0, perplexity={"Other-1B": 8.0}))) == []
    assert list(figures_of(run_results("mine", 4.0, {"wikitext2": 8.0}))) == []


def test_the_report_says_whether_the_run_meets_the_figure_and_how_fast_it_decodes():
    found = run(8.17) | {"widths": None}
    text = render_report(found, layers_table().assign(damping_raises=0), with_spectra=False, with_steps=False)
    assert "\n\nPublished: perplexity on wikitext2 8 (a table); this run has 8.17" in text
    assert "Tokens a second, one at a time without a cache: 50.0 (original), 123.4 (quantized)." in text


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.toml")), ids=lambda path: path.stem)
def test_a_row_of_a_paper_states_a_figure_of_its_model_or_none(path):
    config = read_config(path)
    if config.published is not None:
        stated = {**config.published.perplexity, **config.published.accuracy}
        assert Path(config.model).name in stated


@pytest.mark.parametrize(
    ("name", "model", "perplexity"),
    [
        ("tesseraq-w2", "Llama-2-7b-hf", 8.05),
        ("tesseraq-w2g128", "Llama-2-13b-hf", 5.92),
        ("tesseraq-w2g64", "Llama-2-70b-hf", 4.60),
        ("tesseraq-w2g128-llama-3.2", "Llama-3.2-1B", 18.61),
        ("awq-w3g128-llama-3.2", "Llama-3.2-3B", 10.21),
        ("lqer-w4a8", "llama-7b", 5.895),
    ],
)
def test_a_row_of_a_paper_states_its_figure(name, model, perplexity):
    assert read_config(PAPER / f"{name}.toml").published.perplexity[model] == perplexity


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "must give a perplexity or an accuracy"),
        ('text = "c4"\nperplexity = { a = 5.0 }', "published.text: must be a text of evaluation.perplexity.datasets"),
        ("accuracy = { a = 0.5 }", "published.accuracy: requires evaluation.downstream"),
        ("accuracy = { a = 50.0 }", "published.accuracy.a"),
    ],
)
def test_a_figure_that_the_run_cannot_measure_is_refused(tmp_path, lines, told):
    path = tmp_path / "config.toml"
    path.write_text(f'extends = "preset:gptq"\nmodel = "a"\n[published]\nsource = "s"\ntolerance = 0.1\n{lines}\n')
    with pytest.raises(ConfigError, match=told):
        read_config(path)
