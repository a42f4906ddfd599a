"""The documentation says what the code does: commands run, keys exist, tables are those of the code."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from lqer.config import read_config
from lqer.config.plan import plan_model
from lqer.config.quantize import OverrideConfig
from lqer.config.schema import Config, TrackingConfig
from lqer.data.datasets import DatasetSpec
from lqer.export import make_target, matrix
from lqer.formats import NumberFormat, format_from_dict
from lqer.models.source import resolve_model
from lqer.models.summary import summarize_model
from lqer.report import contract

ROOT = Path(__file__).parents[1]
README, TUTORIAL, SERVING = ((ROOT / name).read_text() for name in ("README.md", "docs/tutorial.md", "docs/serving.md"))
PIPELINE = "python experiments/pipeline.py"
# Tables with a paragraph or a row of their own.
EXPLAINED_ELSEWHERE = (DatasetSpec, OverrideConfig)
PAGES = sorted([ROOT / "README.md", ROOT / "experiments/README.md", *(ROOT / "docs").rglob("*.md")])
# Backticked text that looks like a path of the repository.
REPOSITORY_PATH = re.compile(r"`((?:lqer|tests|configs|docs|experiments|sweeps)/[\w./*-]*)`")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(program: str, page: str = README) -> list[list[str]]:
    lines = [line for block in blocks("sh", page) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


@pytest.mark.parametrize("command", commands(PIPELINE) + commands(PIPELINE, TUTORIAL), ids=" ".join)
def test_a_pipeline_command_of_the_readme_and_the_tutorial_is_valid(command):
    arguments = [argument for argument in command[2:] if argument != "--validate"]
    done = subprocess.run(
        [sys.executable, command[1], "--validate", *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("valid")


def test_the_readme_shows_commands():
    assert len(commands(PIPELINE)) >= 2
    assert len(commands(PIPELINE, TUTORIAL)) >= 3
    assert len(commands("make")) == 3
    assert len(commands("sweeps/")) == 1


@pytest.mark.parametrize("command", commands("make"), ids=" ".join)
def test_a_make_target_of_the_readme_exists(command):
    done = subprocess.run(["make", "-n", command[1]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands("sweeps/"), ids=" ".join)
def test_a_sweep_of_the_readme_exists_and_its_config_too(command):
    assert (ROOT / command[0]).stat().st_mode & 0o100
    assert (ROOT / command[1]).exists()


def test_the_config_of_the_readme_fits_its_model_and_rounds_weights_alone(tmp_path, random_model):
    (text,) = blocks("toml")
    path = tmp_path / "example.toml"
    path.write_text(text)
    random_model("llama").save_pretrained(tmp_path / "model")  # the architecture of the example's
    config = read_config(path)
    plans = plan_model(config, summarize_model(resolve_model(str(tmp_path / "model"))))
    assert {name.rpartition(".")[2]: plan.rank for name, plan in plans.items()} == {
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], 32),
        "down_proj": 64,
    }
    for plan in plans.values():
        assert (plan.weight.kind, plan.weight.bits, plan.activation, plan.bias) == ("int", 3, None, None)
    assert config.quantize.attention == "none"


def test_the_mistake_of_the_readme_is_answered_as_shown():
    shown = re.search(r"\$ python (\S+) (\S+) (\S+)\n(error: .*)\n", README)
    done = subprocess.run([sys.executable, *shown.groups()[:3]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.rstrip() == shown[4]


def keys_of(model: type[BaseModel], prefix: str = "") -> typing.Iterator[str]:
    for name, field in model.model_fields.items():
        nested = [
            part
            for part in (field.annotation, *typing.get_args(field.annotation))
            if isinstance(part, type) and issubclass(part, BaseModel) and part not in EXPLAINED_ELSEWHERE
        ]
        if nested:
            yield from keys_of(nested[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("key", [*keys_of(Config), *keys_of(TrackingConfig, "tracking.")])
def test_every_key_of_the_configuration_is_explained(key):
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert f"`{key}" in page


def test_the_page_of_the_contract_is_made_from_the_code():
    assert (ROOT / "docs" / "results" / "contract.md").read_text() == contract.render()


def test_the_tables_of_export_targets_are_the_targets_own_answers():
    page = (ROOT / "docs" / "serving.md").read_text()
    assert matrix.formats_table() in page
    assert matrix.features_table() in page


@pytest.mark.parametrize(
    "command", [command for command in commands("lqer export", SERVING) if command[3] != "TARGET"], ids=" ".join
)
def test_an_export_command_of_the_page_on_serving_names_a_target_and_its_settings(command):
    settings = dict(argument.removeprefix("--").split("=") for argument in command[5:])
    assert make_target(command[3], settings).kind == command[3]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_to_a_file_and_a_heading(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if re.fullmatch(r"L\d+", anchor):
            assert '"command"' in path.read_text().splitlines()[int(anchor[1:]) - 1], f"{target}#{anchor}"
        else:
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_named_by_a_page_exist(page):
    for path in REPOSITORY_PATH.findall(page.read_text()):
        assert any(ROOT.glob(path.rstrip("/"))), path


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_format_of_the_guide_packs_and_has_the_stated_values(monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/developer/adding-a-format.md").read_text(), re.DOTALL)
    monkeypatch.setattr(NumberFormat, "registry", dict(NumberFormat.registry))  # without it for the tests after this
    module = tmp_path / "power_of_two.py"
    module.write_text(code)
    runpy.run_path(str(module))
    power_of_two = format_from_dict({"kind": "power-of-two", "block_size": 4})
    quantized = power_of_two.quantize(torch.tensor([[8.0, -4.1, 1.9, 0.01], [0.0, 0.0, 0.0, 0.0]]))
    assert quantized.dequantize().tolist() == [[8.0, -4.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    again = power_of_two.unpack(quantized.pack(), quantized.shape, quantized.axis)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert quantized.code_bits + quantized.metadata_bits == 8 * power_of_two.bits_per_value(4)
