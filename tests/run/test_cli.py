"""The command line: what it prints, and one line with status 2 for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest

from lqer.cli import COMMANDS, console, main, split_arguments, take_option
from lqer.config.presets import RECOMMENDED, preset_names
from lqer.errors import ConfigError
from lqer.store import fingerprints
from lqer.store.files import hash_file

ROOT = Path(__file__).parents[2]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments/pipeline.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["c.toml"], (False, "c.toml", None, [])),
        (["c.toml", "tag", "--a.b=1"], (False, "c.toml", "tag", ["--a.b=1"])),
        (["--a=1", "c.toml", "--b=2", "tag"], (False, "c.toml", "tag", ["--a=1", "--b=2"])),
        (["--validate", "c.toml"], (True, "c.toml", None, [])),
    ],
)
def test_arguments_may_come_in_any_order(arguments, expected):
    assert split_arguments(arguments) == expected


@pytest.mark.parametrize("arguments", [["--a=1"], ["a", "b", "c"], ["c.toml", "-x"], []])
def test_other_arguments_are_refused(arguments):
    with pytest.raises(ConfigError):
        split_arguments(arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["c.toml"], ([], ["c.toml"])),
        (["--plugin", "a.py", "c.toml", "--plugin=b.py", "tag"], (["a.py", "b.py"], ["c.toml", "tag"])),
    ],
)
def test_an_option_may_be_given_several_times(arguments, expected):
    assert take_option("--plugin", arguments) == expected


@pytest.mark.parametrize("arguments", [["--plugin"], ["--plugin", "--a=1"], ["--plugin="]])
def test_an_option_without_a_value_is_refused(arguments):
    with pytest.raises(ConfigError, match="--plugin: expected a value"):
        take_option("--plugin", arguments)


class TestConsoleScript:
    """`lqer run|validate|ls`, which takes the arguments of experiments/pipeline.py."""

    @pytest.fixture
    def lqer(self, monkeypatch, capsys):
        def call(*arguments: str) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["lqer", *arguments])
            return console(), *capsys.readouterr()

        return call

    def test_run_and_validate_are_the_pipeline(self, lqer, experiment):
        status, out, _ = lqer("validate", str(experiment.config))
        assert (status, out.splitlines()[-1]) == (0, "valid")
        status, out, _ = lqer("run", str(experiment.config), "tag")
        assert (status, out.splitlines()[-1]) == (0, f"page: {experiment.output / 'tag' / 'report.html'}")

    def test_weights_are_hashed_once_beside_the_imports(self, lqer, experiment, tiny_model, tmp_path, monkeypatch):
        hashed: list[tuple[str, str]] = []

        def noted(file: Path) -> str:
            hashed.append((file.name, threading.current_thread().name.partition("_")[0]))
            return hash_file(file)

        monkeypatch.setattr(fingerprints, "hash_file", noted)
        model = shutil.copytree(tiny_model, tmp_path / "copy")
        os.utime(model / "model.safetensors", ns=(10**18, 10**18))
        assert lqer("validate", str(experiment.config), f"--model={model}")[0] == 0
        assert [thread for name, thread in hashed if name == "model.safetensors"] == ["hash"]

    @pytest.mark.parametrize(
        ("what", "name", "line"),
        [
            ("methods", "lqer-act", "L²QER"),
            ("roundings", "gptq", "arXiv 2210.17323"),
            ("transforms", "hadamard", "QuIP#"),
            ("formats", "mxint", "MXINT"),
            ("statistics", "hessian", "E[x xᵀ]"),
            ("targets", "dense", "safetensors"),
            ("datasets", "pydoc", "without a download"),
            ("datasets", "stdlib", "code"),
        ],
    )
    def test_everything_a_configuration_can_name_is_listed_with_a_line(self, lqer, what, name, line):
        status, out, _ = lqer("ls", what)
        rows = dict(row.split(maxsplit=1) for row in out.splitlines())
        assert status == 0
        assert line in rows[name]

    def test_a_component_is_listed_with_its_settings_and_defaults_as_a_configuration_writes_them(self, lqer):
        rows = dict(row.split(maxsplit=1) for row in lqer("ls", "formats")[1].splitlines())
        settings = 'bits, block_size = 128, symmetric = false, scale_dtype = "float16"'
        assert rows["int"].endswith(f" Settings: {settings}.")
        rows = dict(row.split(maxsplit=1) for row in lqer("ls", "statistics")[1].splitlines())
        assert "Settings" not in rows["hessian"]

    def test_a_preset_is_listed_with_the_first_sentence_of_its_file(self, lqer):
        line = "L2QER (arXiv 2402.02446): W4A8 MXINT, rank 32, rounding error scaled by activation magnitudes."
        assert lqer("ls", "presets", "lqer-act")[1] == f"lqer-act  {line}\n"

    def test_presets_are_listed_with_the_recommended_ones_first_and_folders_of_many_in_a_line(self, lqer):
        sections = [section.splitlines() for section in lqer("ls", "presets")[1].split("\n\n")]
        assert [section[0].split()[0] for section in sections] == ["Recommended:", "Methods:", "Folders,"]
        names = [[line.split()[0] for line in lines] for _, *lines in sections]
        folders = set(names[2])
        assert names[0] == [*RECOMMENDED]
        assert sorted(names[0] + names[1]) == [name for name in preset_names() if "/" not in name]
        assert folders == {f"{name.partition('/')[0]}/" for name in preset_names() if "/" in name}
        assert f"({sum(name.startswith('paper/') for name in preset_names())})" in sections[2][1]

    @pytest.mark.parametrize(
        ("pattern", "shown"),
        [
            ("gptq", ["gptq", "gptq-qera", "tesseraq-gptq"]),
            ("TESSERAQ-W4A4", ["paper/tesseraq-w4a4"]),
            ("trellis-[23]", ["trellis-2", "trellis-3"]),
        ],
    )
    def test_presets_are_found_by_a_part_of_their_names_or_by_wildcards(self, lqer, pattern, shown):
        assert [line.split()[0] for line in lqer("ls", "presets", pattern)[1].splitlines()] == shown

    def test_runs_are_listed_with_their_numbers(self, lqer, tmp_path):
        (tmp_path / "a-run").mkdir()
        text = {"dataset": "wikitext2", "quantized": 12.3456, "protocol": "concat"}
        results = {"model": {"name": "some/model"}, "bits": {"average": 4.5}, "perplexity": [text]}
        (tmp_path / "a-run" / "results.json").write_text(json.dumps(results))
        assert lqer("ls", "runs", str(tmp_path))[1] == "a-run  some/model, 4.500 bits, wikitext2 12.35 (concat)\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["ls", "methds"], "did you mean 'methods'?"),
            (["run", "a", "b", "c"], "expected one config file and at most one tag; found a b c"),
            (["ls", "runs", "/nowhere"], "no such folder: /nowhere"),
            (["ls", "presets", "lqre-act"], "ls presets: none has 'lqre-act' in its name; did you mean 'lqer-act'?"),
            (["quantize"], "expected run, validate, sweep, recommend, export, ls or lm-eval"),
            (["recomend", "preset:demo"], "did you mean 'recommend'?"),
            (["sweep", "a.toml"], "expected a sweep file, a config file and a tag; found a.toml"),
            (["sweep", "a.toml", "preset:demo", "t"], "no such config file: a.toml"),
            (["sweep", "atlas", "preset:demo", "t", "--part=cheap-cpv"], "did you mean 'cheap-cpu'?"),
            (
                ["sweep", "atlas", "preset:demo", "t", "--part=cheap-cpu", "--only=rtn-*"],
                "--part: give it once, and without",
            ),
            (["recommend", "preset:demo"], "expected --bits 3.2 or --size 4GB"),
            (["recommend", "preset:demo", "--bits", "3", "--bits=4"], "--bits: given twice"),
            (["recommend", "preset:demo", "tag", "--bits=3"], "expected one config file; found preset:demo tag"),
        ],
    )
    def test_a_mistake_is_one_line_and_status_2(self, lqer, arguments, message):
        status, out, err = lqer(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err

    def test_help_names_every_command(self, lqer):
        status, out, _ = lqer("--help")
        assert status == 0
        assert re.findall(r"^    lqer ([a-z-]+)", out, re.MULTILINE) == [*COMMANDS, "lm-eval"]
        assert lqer() == (2, out, "")

    def test_the_version_is_that_of_the_package(self, lqer):
        assert lqer("--version") == (0, f"lqer {version('lqer')}\n", "")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_command_explains_itself_when_asked_and_where_it_lacks_arguments(self, lqer, command):
        status, out, err = lqer(command, "--help")
        assert (status, err) == (0, "")
        assert f"\n    lqer {command} " in out
        assert lqer(command) == (2, out, "")


def test_a_run_ends_with_the_table_and_the_paths_of_its_report_and_page(experiment):
    done = subprocess.run(experiment.command("my-tag"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| bits per quantized weight | – | 4.500 |" in done.stdout
    assert "| | original | RTN | lqer-act |" in done.stdout
    *_, report, page = done.stdout.splitlines()
    folder = experiment.output / "my-tag"
    assert (report, page) == (f"report: {folder / 'report.md'}", f"page: {folder / 'report.html'}")
    assert (folder / "report.md").exists()
    assert (folder / "report.html").exists()


def test_without_arguments_the_usage_is_printed():
    done = call()
    assert done.returncode == 2
    assert "experiments/pipeline.py CONFIG [TAG]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.toml"], "no such config file: nowhere.toml"),
        (["configs/demo.toml", "--quantize.wieght=w4"], "did you mean 'weight'?"),
        (["configs/demo.toml", "a", "b"], "at most one tag"),
        (["configs/demo.toml", "--model=/nowhere"], "no such file or folder: /nowhere"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(arguments, part):
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_misspelt_key_does_not_wait_for_transformers():
    code = (
        "import sys; from lqer.cli import main\n"
        "status = main(['configs/demo.toml', '--quantize.wieght=w4'], '')\n"
        "sys.exit(10 * ('transformers' in sys.modules) + status)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=ROOT).returncode == 2


def test_validate_checks_a_local_model_and_runs_nothing(experiment):
    done = subprocess.run(experiment.command("--validate"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "28 of 28 linears in 4 blocks are quantized" in done.stdout
    assert done.stdout.rstrip().endswith("valid")
    assert not experiment.output.exists()


def test_validate_refuses_a_share_as_the_run_would(experiment):
    command = experiment.command("--validate", "--chunk", "1/2", "--quantize.propagate_error=true")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --chunk 1/2: requires quantize.propagate_error")
    assert done.stderr.count("\n") == 1


def test_validate_of_a_hub_model_does_not_need_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = call("--validate", "configs/template/llama-7b.toml")
    assert done.returncode == 0, done.stderr
    assert "w4 (mxint, 4.5 bits)" in done.stdout
    assert "not checked against the model" in done.stdout


def test_a_second_call_in_one_process_logs_every_line_once(experiment, capsys):
    for _ in range(2):
        assert main([str(experiment.config)], "") == 0
    second = capsys.readouterr().err.rpartition("linears in 4 blocks")[2]
    reused = [line for line in second.splitlines() if line.startswith("quantize: reused")]
    assert len(reused) == 1
