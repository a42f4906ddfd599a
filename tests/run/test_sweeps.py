"""Sweeps: what is missing is run, each run once and in a process of its own; one table at the end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lqer.config import Config
from lqer.config.presets import METHODS_FOLDER, preset_path
from lqer.config.sweep import SweepPlan, plan_sweep
from lqer.report.environment import versions
from lqer.report.sweep import read_record, read_runs
from lqer.run.sweep import (
    finished_seconds,
    run_sweep,
    shown_duration,
    time_left,
)

ROOT = Path(__file__).parents[2]
# What SLURM runs has tests of its own.
OTHERS = ("common.sh", "slurm_chunks.sh", "slurm_cluster.sh")
SCRIPTS = sorted(path for path in (ROOT / "sweeps").glob("*.sh") if path.name not in OTHERS)
TEMPLATE = ROOT / "configs/template/opt-125m.toml"
# The demo is a part of the Makefile.
WITHOUT_SCRIPT = ["demo"]
NAMES = [
    "atlas", "baseline_no_lqer", "block_methods", "gptvq",
    "lqer_act", "lqer_act_int", "lqer_act_weight_only", "lqer_svd",
]  # fmt: skip
# Shared by presets, and a preset that another one differs from in its budget only.
NO_SCHEMES = {"protocol", "tesseraq"}


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """Stands in for the interpreter: notes its arguments, one a line."""
    path = tmp_path / "python"
    path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$CALLS"\n')
    path.chmod(0o755)
    return path


def call(script: Path, recorder: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    calls = recorder.with_name("calls.txt")
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        [str(script), *arguments],
        env=os.environ | {"PYTHON": str(recorder), "CALLS": str(calls)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def planned(arguments: list[str]) -> SweepPlan:
    _, path, config, tag, *overrides = arguments
    return plan_sweep(path, config, tag, overrides)


def test_every_sweep_is_a_script_and_a_file():
    assert [path.stem for path in SCRIPTS] == NAMES
    assert sorted(path.stem for path in (ROOT / "sweeps").glob("*.toml")) == sorted([*NAMES, *WITHOUT_SCRIPT])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
class TestScript:
    def test_every_combination_is_a_valid_experiment_with_a_tag_of_its_own(self, script, recorder):
        status, arguments = call(script, recorder, str(TEMPLATE), "tag", OUTPUT_DIR="out")
        assert status == 0
        tags = [run.config.tag for run in planned(arguments).runs]
        assert len(tags) >= 4
        assert all(tag.startswith("tag-") for tag in tags)
        assert {run.config.output_dir for run in planned(arguments).runs} == {"out"}

    def test_further_overrides_are_handed_to_every_run(self, script, recorder):
        _, arguments = call(script, recorder, str(TEMPLATE), "tag", "--model=other/model", KEEP_GOING="1")
        plan = planned(arguments)
        assert {(run.config.model, run.config.output_dir) for run in plan.runs} == {("other/model", "checkpoints")}
        assert plan.keep_going

    def test_without_its_arguments_it_says_how_it_is_used(self, script, recorder):
        assert call(script, recorder, "some.toml") == (2, [])


def test_the_settings_of_a_script_reach_its_runs(recorder):
    environment = {"WEIGHTS": "2g32 3channel", "STEPS": "25", "EPOCHS": "5"}
    _, arguments = call(ROOT / "sweeps/block_methods.sh", recorder, str(TEMPLATE), "tag", **environment)
    runs = {run.name: run.config for run in planned(arguments).runs}
    assert runs["int2g32-tesseraq"].formats["q"].block_size == 32
    assert runs["int3channel-rtn"].formats["q"].block_size == "row"
    assert runs["int2g32-tesseraq"].quantize.rounding.steps == 25
    assert runs["int2g32-tesseraq"].quantize.rounding.learning_rate == 2e-2
    assert runs["int2g32-omniquant"].quantize.transforms[0].epochs == 5
    _, arguments = call(ROOT / "sweeps/gptvq.sh", recorder, str(TEMPLATE), "tag", RANKS="2 21")
    ranks = {run.config.quantize.low_rank.rank for run in planned(arguments).runs}
    assert ranks == {0, 2, 21}


class TestAtlas:
    @pytest.fixture(scope="class")
    def atlas(self):
        return plan_sweep(ROOT / "sweeps/atlas.toml", TEMPLATE, "tag")

    def test_it_has_every_preset_of_a_method(self, atlas):
        used = {preset.removeprefix("preset:") for run in atlas.runs for preset in run.extends}
        folder = preset_path("rtn").parent
        assert folder.name == METHODS_FOLDER
        assert used == {path.stem for path in folder.glob("*.toml")} - NO_SCHEMES

    def test_all_runs_share_calibration_seed_and_evaluation(self, atlas):
        def shared(config: Config) -> str:
            calibration = config.calibration.model_copy(update={"round_inputs": False, "token_weights": "none"})
            return repr((config.model, config.seed, config.dtype, calibration, config.evaluation))

        assert len({shared(run.config) for run in atlas.runs}) == 1

    def test_it_goes_on_after_a_run_that_fails(self, atlas):
        assert atlas.keep_going

    @pytest.mark.parametrize("part", ["cheap-cpu", "cheap-gpu"])
    def test_its_cheap_parts_train_nothing_and_span_two_to_four_bits(self, atlas, part):
        cheap = [run.config for run in atlas.part(part).runs]
        bits = [config.formats[config.quantize.weight].bits_per_value(4096) for config in cheap]
        assert min(bits) < 2.5
        assert max(bits) > 4
        assert all(config.finetune is None and not config.quantize.chosen_rounding.together for config in cheap)

    def test_it_spans_two_to_five_bits_with_and_without_activations(self, atlas):
        bits = {run.config.formats[run.config.quantize.weight].bits_per_value(4096) for run in atlas.runs}
        assert 2 <= min(bits) < 2.1
        assert 4 < max(bits) < 5
        assert {run.config.quantize.activation for run in atlas.runs} >= {"none", "x8", "x4"}


def test_the_schemes_of_the_demo_have_the_same_bits_within_a_fiftieth():
    (rtn, *others) = plan_sweep("demo", ROOT / "configs/demo.toml", "tag").runs
    # (out, in) of the linears of a block of its model: q and o, k and v, gate and up, down.
    shapes = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]

    def bits(config: Config) -> float:
        weight, factors = (config.formats.get(n) for n in (config.quantize.weight, config.quantize.low_rank.format))
        rank = config.quantize.low_rank.rank
        stored = [weight.bits_per_value(i) * o * i for o, i in shapes]
        stored += [rank * (o + i) * factors.bits_per_value(i) for o, i in shapes if rank]
        return sum(stored) / sum(o * i for o, i in shapes)

    assert all(abs(bits(run.config) - bits(rtn.config)) < 0.02 for run in others)
    assert all(run.config.quantize.activation == "none" for run in [rtn, *others])


@pytest.fixture
def small(experiment):
    """A sweep of two runs over the tiny experiment."""
    path = experiment.folder / "small.toml"
    path.write_text('[grid]\nquantize.weight = ["w4", "w3"]\n')
    return path


def plan_small(small: Path, experiment, *overrides: str) -> SweepPlan:
    return plan_sweep(small, experiment.config, "s", overrides)


class TestRunner:
    def test_every_run_is_executed_once(self, small, experiment):
        called: list[str] = []
        outcome = run_sweep(plan_small(small, experiment), lambda config: called.append(config.tag))
        assert called == ["s-w4", "s-w3"]
        assert [run.name for run in outcome.finished] == ["w4", "w3"]
        assert not outcome.failed

    def test_a_failure_stops_the_sweep_and_what_is_left_is_named(self, small, experiment):
        outcome = run_sweep(plan_small(small, experiment), lambda config: "it broke")
        assert outcome.failed == {"w4": "it broke"}
        assert [run.name for run in outcome.not_started] == ["w3"]

    def test_a_sweep_that_keeps_going_runs_the_rest(self, small, experiment):
        plan = plan_small(small, experiment, "--keep_going=true")
        outcome = run_sweep(plan, lambda config: "it broke" if config.tag == "s-w4" else None)
        assert outcome.failed == {"w4": "it broke"}
        assert [run.name for run in outcome.finished] == ["w3"]

    def test_a_sweep_does_not_keep_going_where_all_first_runs_fail_alike(self, small, experiment):
        small.write_text("[grid]\nquantize.low_rank.rank = [1, 2, 3, 4, 5]\n")
        plan = plan_small(small, experiment, "--keep_going=true")
        outcome = run_sweep(plan, lambda config: "the text is too short")
        assert (list(outcome.failed), len(outcome.not_started)) == (["1", "2", "3"], 2)
        outcome = run_sweep(plan, lambda config: f"rank {config.quantize.low_rank.rank} is odd")
        assert (len(outcome.failed), outcome.not_started) == (5, ())

    def test_runs_follow_one_another_as_the_file_has_them(self):
        """The atlas has cheap schemes first: statistics that runs share are in the store, in whatever order."""
        plan = plan_sweep("atlas", TEMPLATE, "tag")
        tags: list[str] = []
        run_sweep(plan, lambda config: tags.append(config.tag))
        assert tags == [f"tag-{run.name}" for run in plan.runs]
        assert tags.index("tag-gptq-w3g128") < tags.index("tag-caldera-2-r32")

    def test_the_estimate_goes_by_runs_of_the_same_kind(self):
        runs = plan_sweep(ROOT / "sweeps/atlas.toml", TEMPLATE, "tag").runs
        by_name = {run.name: run for run in runs}
        done = [(by_name["rtn-w4g128"], 10.0), (by_name["gptq-w4g128"], 50.0)]
        told = time_left(done, [by_name["rtn-w3g128"], by_name["gptq-w3g128"], by_name["caldera-2-r32"]])
        rest = "from 2 finished runs; 3 to go, 1 of them of kinds that have not finished yet"
        assert told == f"about {shown_duration(10 + 50 + 30)} left, {rest}"


class TestFinished:
    """A run counts as finished only while its results are those of this configuration, code and these files."""

    @pytest.fixture
    def finished(self, small, experiment):
        config = plan_small(small, experiment).runs[0].config
        folder = experiment.output / config.tag
        (folder / "checkpoint").mkdir(parents=True)
        results = {
            "schema_version": 1,
            "config": config.model_dump(mode="json", exclude_none=True),
            "versions": versions(),
            "seconds": {"total": 12.5},
        }
        (folder / "results.json").write_text(json.dumps(results))
        return config, folder

    def test_it_is_with_its_results(self, finished):
        assert finished_seconds(finished[0], versions()) == 12.5

    def test_it_is_not_under_another_configuration(self, finished):
        changed = finished[0].model_copy(update={"seed": 5})
        assert finished_seconds(changed, versions()) is None

    def test_it_is_not_under_another_commit(self, finished):
        assert finished_seconds(finished[0], {**versions(), "git": "another"}) is None

    def test_it_is_not_without_its_checkpoint(self, finished):
        (finished[1] / "checkpoint").rmdir()
        assert finished_seconds(finished[0], versions()) is None

    def test_it_is_not_once_a_text_has_changed(self, finished, experiment):
        later = time.time() + 60
        os.utime(experiment.folder / "evaluation.txt", (later, later))
        assert finished_seconds(finished[0], versions()) is None

    def test_it_is_not_before_it_ends(self, finished):
        (finished[1] / "results.json").unlink()
        assert finished_seconds(finished[0], versions()) is None


def command(experiment, small: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "experiments/sweep.py"), str(small), str(experiment.config), "s", *overrides]


def run(experiment, small: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(experiment, small, *overrides), capture_output=True, text=True, check=False)


@pytest.fixture(scope="class")
def whole(undisturbed):
    """A sweep that has ended: two runs, and one that cannot run."""
    path = undisturbed.folder / "whole.toml"
    path.write_text("""
keep_going = true
[[run]]
name = "impossible"
set = { quantize.skip = ["*"] }
[[run]]
name = "{quantize.weight}"
grid = { quantize.weight = ["w4", "w3"] }
""")
    return undisturbed, path, run(undisturbed, path, "--quantize.low_rank.rank=4")


class TestEndToEnd:
    def test_the_others_go_on_after_a_run_that_fails(self, whole):
        experiment, _, done = whole
        assert done.returncode == 1
        failed = re.findall(r"^failed: impossible: (.+)$", done.stderr, flags=re.MULTILINE)
        assert len(failed) == 1
        assert {"| w4 |", "| w3 |"} <= set(re.findall(r"^\| w\d \|", done.stdout, flags=re.MULTILINE))
        assert f"- `impossible`: {failed[0]}" in (experiment.output / "s-table/ranking.md").read_text()

    def test_the_remaining_time_is_estimated_from_the_first_finished_run(self, whole):
        assert "left, from 1 finished runs; 1 to go" in whole[2].stderr

    def test_one_calibration_serves_all(self, whole):
        assert len(list((whole[0].output / "store").glob("calibrate-*/manifest.json"))) == 1

    def test_there_is_one_table_with_pictures(self, whole):
        files = {path.name for path in (whole[0].output / "s-table").iterdir()}
        assert files >= {
            "results.csv", "results.md", "ranking.md", "ranking.csv", "sweep.json", "report.html",
            "ranking-tiny-llama-evaluation.txt.png", "pareto-tiny-llama-evaluation.txt-concat-64.png",
        }  # fmt: skip

    def test_every_row_has_the_command_that_repeats_it(self, whole):
        page = (whole[0].output / "s-table/ranking.md").read_text()
        (line,) = re.findall(r"^    (lqer .*--only w3)$", page, flags=re.MULTILINE)
        assert shlex.split(line)[1:3] == ["sweep", str(whole[1])]
        assert "--quantize.low_rank.rank=4" in shlex.split(line)
        assert "Tokens/s" not in page  # of which no run on a CPU has any

    def test_a_second_time_nothing_that_is_finished_runs(self, whole):
        experiment, path, first = whole
        again = run(experiment, path, "--quantize.low_rank.rank=4", "--only=w?")
        assert again.returncode == 0, again.stderr
        assert again.stderr == "2 of 2 runs are finished\n"
        assert again.stdout == first.stdout


def test_a_mistake_is_answered_before_any_run_with_status_2(experiment, small):
    small.write_text('[grid]\nquantize.weight = ["w4", "w5"]\n')
    done = run(experiment, small)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*run 'w5': quantize\.weight: .*\n", done.stderr)
    assert not experiment.output.exists()


@pytest.mark.usefixtures("heard_interrupts")
def test_an_interrupted_sweep_ends_at_once_and_resumes(experiment, small, tmp_path):
    # The second run waits before its first line, or else it might be finished before the signal comes.
    plugin = tmp_path / "waits.py"
    plugin.write_text(
        f"import multiprocessing, pathlib, time\nfirst = pathlib.Path({str(tmp_path / 'first')!r})\n"
        "if multiprocessing.parent_process() is not None:\n"
        "    time.sleep(60 if first.exists() else 0)\n    first.touch()\n"
    )
    process = subprocess.Popen(command(experiment, small, f"--plugin={plugin}"), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "1 to go" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, rest
    assert "Interrupted. Rerun the same command to resume." in rest
    assert len(read_runs(read_record(experiment.output / "s-table"), experiment.output)) == 1
    resumed = run(experiment, small)
    assert resumed.returncode == 0, resumed.stderr
    assert "1 of 2 runs are finished" in resumed.stderr


@pytest.mark.usefixtures("heard_interrupts")
def test_an_interrupt_at_the_terminal_ends_with_its_line(experiment, small):
    begun = command(experiment, small)
    process = subprocess.Popen(begun, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "1 to go" in line:
            break
    # A terminal's signal goes to all processes of the group, also to the run that has begun to show its progress.
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, rest
    assert rest.endswith("Interrupted. Rerun the same command to resume.\n")


def test_a_run_that_is_killed_leaves_a_line(small, experiment, tmp_path):
    # Of a process that another one started, and not of the one that reads the sweep.
    plugin = tmp_path / "killer.py"
    plugin.write_text(
        "import multiprocessing, os, signal\n"
        "if multiprocessing.parent_process() is not None:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run(experiment, small, "--only=w4", f"--plugin={plugin}")
    assert done.returncode == 1
    assert "failed: w4: the process was killed by SIGKILL, as the system does when memory runs out" in done.stderr
    # What repeats the runs is recorded before the first one, with the plug-ins that they need.
    record = json.loads((experiment.output / "s-table/sweep.json").read_text())
    assert shlex.split(record["command"])[-1] == f"--plugin={plugin}"
