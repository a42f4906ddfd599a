"""A run with components from outside the package: new files, and no edit of an existing one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lqer.results import RESULTS_FILE

ROOT = Path(__file__).parents[2]
PAGE, FORMAT_PAGE = (ROOT / "docs/developer" / name for name in ("adding-a-method.md", "adding-a-format.md"))
FILES = {
    "mean_inputs.py": """
import torch

from lqer.statistics import Statistic


class MeanAccumulator:
    def __init__(self, in_features, device):
        self.sum_I, self.tokens = torch.zeros(in_features, dtype=torch.float64, device=device), 0

    def add(self, x_NI, original_NI, sampled_N):
        self.sum_I += x_NI.double().sum(0)
        self.tokens += len(x_NI)

    def join(self, gang):
        gang.sum_(self.sum_I)
        self.tokens = sum(gang.gathered(self.tokens))

    def result(self):
        return (self.sum_I / self.tokens).float()


class MeanInput(Statistic):
    kind = "mean-input"

    def accumulator(self, in_features, device, offload):
        return MeanAccumulator(in_features, device)

    def nbytes(self, in_features):
        return 8 * in_features
""",
    "shifted.py": """
from dataclasses import dataclass
from pathlib import Path

from lqer.rounding import Rounding
from mean_inputs import MeanInput


@dataclass(frozen=True)
class Shifted(Rounding):
    kind = "shifted"
    statistics = frozenset({MeanInput()})

    fraction: float = 1.0

    def round(self, weight_OI, statistics, number_format):
        with Path("rounded.txt").open("a") as seen:
            seen.write(f"{self.fraction} {tuple(statistics['mean-input'].shape)} {tuple(weight_OI.shape)}\\n")
        shift_I = self.fraction * statistics["mean-input"]
        return number_format.quantize(weight_OI * (1 + shift_I))
""",
    "shifted_method.py": """
from lqer.methods import LqerAct
from shifted import Shifted


class ShiftedMethod(LqerAct):
    kind = "shifted"
    rounding = Shifted()
""",
}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def results_of(experiment, tag: str) -> dict:
    return json.loads((experiment.output / tag / RESULTS_FILE).read_text())


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    folder = tmp_path / "plugin"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder / "shifted_method.py"


def test_a_statistic_a_rounding_and_a_method_are_three_new_files(experiment, plugin, tmp_path):
    command = experiment.command(
        "--plugin", str(plugin), "--quantize.method=shifted", "--quantize.rounding={ kind = 'shifted', fraction = 0.5 }"
    )
    run(command, tmp_path)
    results = results_of(experiment, "tiny")
    assert results["config"]["quantize"]["rounding"] == {"kind": "shifted", "fraction": 0.5}
    assert results["layers"]["count"] == 28
    seen = (tmp_path / "rounded.txt").read_text().splitlines()
    assert len(seen) >= 28
    assert "0.5 (64,) (96, 64)" in seen

    assert "reused quantize" in run(command, tmp_path)
    # Editing a component's file makes a new checkpoint.
    shifted = plugin.parent / "shifted.py"
    shifted.write_text(shifted.read_text().replace("(1 + shift_I)", "(1 - shift_I)"))
    assert "reused quantize" not in run(command, tmp_path)


def test_without_the_plugin_its_names_are_unknown(experiment):
    done = subprocess.run(experiment.command("--quantize.method=shifted"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "quantize.method: unknown method 'shifted'" in done.stderr


def test_the_method_of_the_documentation_runs(experiment, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "my_qep.py").write_text(code)
    weight = ["--formats.w3={ kind = 'int', bits = 3, block_size = 16 }", "--quantize.weight=w3"]
    command = experiment.command("--plugin", "my_qep.py", "--quantize.method=qep", *weight)
    run([*command, "--quantize.rounding={ kind = 'qep', strength = 0.25 }", "--tag=qep"], tmp_path)
    run([*command, "--quantize.rounding={ kind = 'qep', strength = 0.0 }", "--tag=gptq"], tmp_path)
    corrected, gptq = (results_of(experiment, tag) for tag in ("qep", "gptq"))
    assert corrected["bits"] == gptq["bits"]
    assert corrected["perplexity"][0]["quantized"] != gptq["perplexity"][0]["quantized"]

    refused = subprocess.run(
        [*command, "--quantize.propagate_error=false"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "must be true (or unset): drift compares the quantized model's inputs" in refused.stderr


def test_the_format_of_the_documentation_runs_and_its_checkpoint_is_exported_with_the_plugin(experiment, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT_PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "power.py").write_text(code)
    weight = ["--formats.p={ kind = 'power-of-two', block_size = 16 }", "--quantize.weight=p"]
    run(experiment.command("--plugin", "power.py", *weight), tmp_path)

    export = [sys.executable, "-c", "from lqer.cli import script; script()", "export", str(experiment.output / "tiny")]
    refused = subprocess.run([*export, "dense", "out"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "number format 'power-of-two' is unknown: load its plug-in first" in refused.stderr
    run([*export, "dense", "out", "--plugin", "power.py"], tmp_path)
    assert json.loads((tmp_path / "out" / "lqer_export.json").read_text())["check"]["logit_difference"] < 1e-4
