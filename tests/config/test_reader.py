"""Reading a configuration: what extends what, what overrides what, and files that cannot be read."""

from __future__ import annotations

import pytest
from helpers import config_mistake as mistake

from lqer.config import read_config
from lqer.config.reader import parse_override
from lqer.errors import ConfigError
from lqer.methods import Caldera, QeraExact


class TestExtends:
    def test_a_file_extends_another_key_by_key(self, tmp_path, base):
        child = tmp_path / "child.toml"
        child.write_text('extends = "base.toml"\n[quantize]\nlow_rank = { rank = 8 }\n')
        config = read_config(child)
        assert config.model == "some/model"
        assert (config.quantize.low_rank.rank, config.quantize.low_rank.format) == (8, "x8")

    def test_of_several_parents_the_later_one_wins(self, tmp_path, base):
        (tmp_path / "second.toml").write_text("seed = 5\n[formats]\nw4 = { bits = 3 }\n")
        child = tmp_path / "child.toml"
        child.write_text('extends = ["base.toml", "second.toml"]\n')
        config = read_config(child)
        assert config.seed == 5
        assert (config.formats["w4"].bits, config.formats["w4"].block_size) == (3, 32)

    def test_a_budget_takes_the_place_of_an_inherited_rank(self, base):
        assert read_config(base).quantize.low_rank.rank > 0
        low_rank = read_config(base, None, ["--quantize.low_rank={ budget_bits = 5.5 }"]).quantize.low_rank
        assert (low_rank.rank, low_rank.budget_bits) == (0, 5.5)

    def test_paths_are_relative_to_the_extending_file(self, tmp_path, base):
        (tmp_path / "deep").mkdir()
        child = tmp_path / "deep" / "child.toml"
        child.write_text('extends = "../base.toml"\n')
        assert read_config(child).model == "some/model"

    def test_a_number_format_of_another_kind_replaces_the_old_one_whole(self, tmp_path, base):
        child = tmp_path / "child.toml"
        child.write_text('extends = "base.toml"\n[formats]\nw4 = { kind = "int", bits = 4 }\n')
        assert read_config(child).formats["w4"].block_size == 128

    def test_a_setting_goes_to_the_component_that_was_named_by_its_kind_alone(self, base):
        settings = ["--quantize.method=caldera", "--quantize.method.down_date=0.5"]
        method = read_config(base, None, settings).quantize.method
        assert method == Caldera(down_date=0.5)
        assert read_config(base, None, [*settings, "--quantize.method=qera-exact"]).quantize.method == QeraExact()

    def test_a_circle_is_refused_with_its_members(self, tmp_path):
        (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
        (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
        assert "a.toml -> b.toml -> a.toml" in mistake(tmp_path / "a.toml")

    def test_a_file_may_be_reached_by_two_ways(self, tmp_path, base):
        for name in ("left", "right"):
            (tmp_path / f"{name}.toml").write_text('extends = "base.toml"\n')
        child = tmp_path / "child.toml"
        child.write_text('extends = ["left.toml", "right.toml"]\n')
        assert read_config(child).model == "some/model"

    def test_a_missing_parent_is_named_with_the_file_that_wants_it(self, tmp_path):
        child = tmp_path / "child.toml"
        child.write_text('extends = "nowhere.toml"\n')
        message = mistake(child)
        assert "child.toml" in message
        assert "nowhere.toml" in message


class TestOverrides:
    @pytest.mark.parametrize(
        ("argument", "expected"),
        [
            ("--a.b=1", {"a": {"b": 1}}),
            ("--a=true", {"a": True}),
            ("--a=w4", {"a": "w4"}),
            ("--a='1'", {"a": "1"}),
            ("--a=[1, 2]", {"a": [1, 2]}),
            ("--a={ b = 2 }", {"a": {"b": 2}}),
            ("--a=x=y", {"a": "x=y"}),
            ("--a=some/model", {"a": "some/model"}),
            ("--a=", {"a": ""}),
        ],
    )
    def test_a_value_is_read_as_toml_and_a_bare_word_as_a_string(self, argument, expected):
        assert parse_override(argument) == expected

    @pytest.mark.parametrize("argument", ["--a", "--=1", "--a..b=1", "a=1"])
    def test_another_form_is_refused(self, argument):
        with pytest.raises(ConfigError, match=r"--section\.key=value"):
            parse_override(argument)

    def test_a_date_is_taken_as_the_word_it_was_typed_as(self, base):
        assert read_config(base, None, ["--tag=1979-05-27"]).tag == "1979-05-27"

    def test_the_later_override_wins(self, base):
        assert read_config(base, None, ["--seed=1", "--seed=2"]).seed == 2

    def test_the_tag_comes_from_the_command_line_then_the_file_then_the_file_name(self, base):
        assert read_config(base).tag == "base"
        assert read_config(base, None, ["--tag=override"]).tag == "override"
        assert read_config(base, "word").tag == "word"


class TestFilesThatCannotBeRead:
    def test_what_is_no_toml_is_named_with_its_place(self, tmp_path):
        path = tmp_path / "broken.toml"
        path.write_text("model = \n")
        message = mistake(path)
        assert str(path) in message
        assert "line 1" in message

    def test_a_file_that_is_not_there_is_named(self, tmp_path):
        assert mistake(tmp_path / "nowhere.toml") == f"no such config file: {tmp_path / 'nowhere.toml'}"

    def test_a_folder_is_no_config(self, tmp_path):
        assert "is a folder" in mistake(tmp_path)
