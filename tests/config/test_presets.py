"""Presets: configurations of the package, named from anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lqer.config import read_config
from lqer.config.presets import RECOMMENDED, preset_names, preset_path, read_summary
from lqer.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_every_configuration_of_the_repository_is_one():
    files = {path.resolve() for path in (ROOT / "configs").rglob("*.toml")}
    assert {preset_path(name).resolve() for name in preset_names()} == files


def test_every_one_says_what_it_is():
    assert all(read_summary(name).endswith(".") for name in preset_names())


def test_those_that_the_page_on_choosing_advises_are_the_recommended_ones():
    advice = (ROOT / "docs/choosing.md").read_text().partition("<!-- table")[0]
    assert set(re.findall(r"`((?:best|serve)-\w+)`", advice)) == set(RECOMMENDED)


def test_a_sentence_over_several_lines_is_told_to_its_end():
    assert read_summary("gptq").endswith("error feedback across columns, error propagation across blocks.")


def test_a_configuration_anywhere_extends_one(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = ["preset:lqer-act", "preset:formats/int"]\nmodel = "some/model"\n')
    config = read_config(path)
    assert (config.tag, config.quantize.method.kind) == ("mine", "lqer-act")
    assert {"w4", "w4g128"} <= set(config.formats)


def test_one_can_be_read_by_its_name():
    assert read_config("preset:demo") == read_config(ROOT / "configs/demo.toml")


def test_a_misspelt_one_is_answered_with_the_nearest(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "preset:lqer-atc"\n')
    with pytest.raises(ConfigError, match=r"preset:lqer-atc: no such preset .*; did you mean 'lqer-act'\?"):
        read_config(path)
