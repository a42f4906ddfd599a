"""A sweep expands into the experiments that its file says, and a mistake in it is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lqer.config.sweep import SweepPlan, plan_sweep
from lqer.errors import ConfigError

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.toml"))
TEMPLATE = ROOT / "configs/template/opt-125m.toml"
Plan = Callable[..., SweepPlan]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Plans a sweep of the given text over a configuration of its own protocol."""
    config = tmp_path / "mine.toml"
    config.write_text("""
extends = "preset:lqer-act"
model = "some/model"
seed = 7
calibration = { dataset = "c4", num_samples = 5, round_inputs = true }
evaluation.perplexity = { datasets = ["ptb"], seq_len = 64 }
""")

    def planned(text: str, *overrides: str) -> SweepPlan:
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return plan_sweep(path, config, "tag", overrides)

    return planned


def names(plan: SweepPlan) -> list[str]:
    return [run.name for run in plan.runs]


def test_a_grid_is_every_combination_named_by_its_values(plan):
    made = plan('[grid]\nquantize.weight = ["w4", "w3"]\n"quantize.low_rank.rank" = [8, 16]\n')
    assert names(made) == ["w4-8", "w4-16", "w3-8", "w3-16"]
    assert made.runs[0].config.tag == "tag-w4-8"
    assert [(run.config.quantize.weight, run.config.quantize.low_rank.rank) for run in made.runs][2] == ("w3", 8)


def test_a_named_set_moves_several_keys_together(plan):
    made = plan("""
name = "{quantize.weight}{input}"
[grid]
quantize.weight = ["w4"]
input = [{ name = "x6", quantize = { activation = "x6", attention = "x6" } }, { name = "x8" }]
""")
    assert names(made) == ["w4x6", "w4x8"]
    quantize = made.runs[0].config.quantize
    assert (quantize.activation, quantize.attention, made.runs[1].config.quantize.activation) == ("x6", "x6", "x8")


def test_every_row_runs_under_every_combination(plan):
    made = plan("""
[grid]
quantize.weight = ["w4", "w3"]
[[run]]
name = "{quantize.weight}-plain"
set = { quantize.low_rank.rank = 0 }
[[run]]
name = "{quantize.weight}-r{quantize.low_rank.rank}"
grid = { quantize.low_rank.rank = [4, 8] }
""")
    assert names(made) == ["w4-plain", "w4-r4", "w4-r8", "w3-plain", "w3-r4", "w3-r8"]


def test_a_row_takes_its_scheme_from_presets_and_all_else_from_the_configuration(plan):
    (run,) = plan('[[run]]\nname = "a"\nextends = "preset:best-w4a8"\nset = { quantize.asymmetric = 0.5 }\n').runs
    config = run.config
    assert (config.quantize.method.kind, config.quantize.weight, config.quantize.asymmetric) == (
        "gptq",
        "w4rise",
        0.5,
    )
    # Nothing is left of the configuration's own scheme, and nothing of the preset's protocol.
    assert config.quantize.low_rank.rank == 0
    assert config.quantize.attention == "none"
    assert (config.calibration.dataset.path, config.calibration.num_samples, config.seed) == ("c4", 5, 7)
    assert config.evaluation.perplexity.datasets[0].path == "ptb"
    assert config.evaluation.baselines == ("original", "rtn")
    assert (run.extends, run.scheme) == (("preset:best-w4a8",), {"quantize": {"asymmetric": 0.5}})


@pytest.mark.parametrize(("preset", "rounded"), [("gptq", False), ("best-w4a8", True)])
def test_how_statistics_are_taken_belongs_to_the_scheme(plan, preset, rounded):
    (run,) = plan(f'[[run]]\nname = "a"\nextends = "preset:{preset}"\n').runs
    assert run.config.calibration.round_inputs is rounded


def test_what_a_preset_trains_on_is_the_calibration_text_of_all_rows(plan):
    text = '[[run]]\nname = "a"\nextends = ["preset:gptq", "preset:finetune/end-to-end"]\n'
    (run,) = plan(text).runs
    assert run.config.finetune.dataset.path == "c4"
    (run,) = plan(text, "--calibration.dataset=ptb").runs
    assert run.config.finetune.dataset.path == "ptb"


def test_the_command_line_has_the_last_word(plan):
    text = 'parameters = { rank = 4 }\nset = { quantize.low_rank.rank = "$rank" }\n[grid]\nquantize.weight = ["w3"]\n'
    made = plan(text, "--quantize.weight=w2", "--parameters.rank=12", "--keep_going=true")
    assert made.keep_going
    assert (made.runs[0].config.quantize.weight, made.runs[0].config.quantize.low_rank.rank) == ("w2", 12)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[gird]\nquantize.weight = ["w4"]', "gird: unknown key; allowed: name, keep_going, .*did you mean 'grid'"),
        ('[[run]]\nname = "a"\nextend = "preset:rtn"', "run.0.extend: unknown key; .*did you mean 'extends'"),
        ('[[run]]\nset = {}', "run.0.name: is missing"),
        ("keep_going = true", "has no run"),
        ("[grid]", "has no run"),
        ("[grid]\nquantize.weight = []", "grid.quantize.weight: is an empty list"),
        ('[grid]\nquantize.weight = "w4"', "grid.quantize.weight: must be a list of values; found 'w4'"),
        ('[grid]\nquantize.transforms = [["awq"]]', "grid.quantize.transforms: a list needs a name"),
        ("[grid]\nx = [{ seed = 1 }]", "grid.x: a set of keys needs a name"),
        ('name = "a"\n[grid]\nseed = [1, 2]', "2 runs are named 'a'"),
        ('name = "{sed}"\n[grid]\nseed = [1, 2]', "no such axis: sed; axes: seed"),
        ('[[run]]\nname = "a"\n[[run]]\nname = "a"', "2 runs are named 'a'"),
        ('[[run]]\nname = "a/b"', "tag: must be a plain folder name"),
        ('[[run]]\nname = "a"\nextends = "preset:nothing"', "preset:nothing: no such preset"),
        ('[[run]]\nname = "a"\nset = { quantize.weight = "$w" }', r"no such parameter: \$w"),
        ('[grid]\nquantize.wieght = ["w4"]', "run 'w4': quantize.wieght: unknown key; .*did you mean 'weight'"),
        ('[[run]]\nname = "b"\nset = { quantize.weight = "w9" }', "run 'b': quantize.weight: .*w9"),
        ("grid = 3", "grid: must be a valid dictionary"),
        ("not TOML", "not TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(plan, text, told):
    with pytest.raises(ConfigError, match=told) as caught:
        plan(text)
    assert "\n" not in str(caught.value)


def test_an_override_of_a_parameter_that_does_not_exist_is_refused(plan):
    with pytest.raises(ConfigError, match="unknown parameter; allowed: steps; did you mean 'steps'"):
        plan('parameters = { steps = 3 }\n[[run]]\nname = "a"\n', "--parameters.step=4")


def test_runs_are_picked_by_name(plan):
    made = plan("[grid]\nseed = [1, 2, 13]\n")
    assert names(made.only(["1*"])) == ["1", "13"]
    assert names(made.only([])) == ["1", "2", "13"]
    with pytest.raises(ConfigError, match=r"--only 4: no such run; .* has 1, 2, 13"):
        made.only(["4"])


def test_a_part_is_the_runs_that_the_file_names(plan):
    made = plan('parts.cheap = ["w3"]\n[grid]\nquantize.weight = ["w4", "w3"]\n')
    assert names(made.part("cheap")) == ["w3"]
    with pytest.raises(ConfigError, match=r"--part chep: no such part; .* has cheap; did you mean 'cheap'"):
        made.part("chep")
    with pytest.raises(ConfigError, match=r"--part cheap: .* has none"):
        plan('[grid]\nquantize.weight = ["w4"]\n').part("cheap")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_of_the_package_is_named_from_anywhere(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert names(plan_sweep(path.stem, TEMPLATE, "tag")) == names(plan_sweep(path, TEMPLATE, "tag"))


def test_a_misspelt_sweep_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"atlsa: no such sweep; .*; did you mean 'atlas'"):
        plan_sweep("atlsa", TEMPLATE, "tag")


def test_runs_of_one_sweep_share_a_folder(plan):
    made = plan('[grid]\noutput_dir = ["a", "b"]\n')
    with pytest.raises(ConfigError, match="output_dir: must be the same for all runs; found a, b"):
        _ = made.output_dir
