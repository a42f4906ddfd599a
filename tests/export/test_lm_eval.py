"""lm-eval's own command line and calls, with the model "lqer"."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from lqer.errors import ModelError
from lqer.export import Native, export
from lqer.export.lm_eval import LqerLM
from lqer.formats import MXInt
from lqer.methods import LqerAct

TASKS = Path(__file__).parents[2] / "experiments" / "tasks"
QUESTIONS = [
    {
        "question": f"What follows {number}?",
        "choices": {"text": [str(number + 1), f"{number} again", "nothing at all"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[number % 3],
    }
    for number in range(10)
]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    (tmp_path / "data" / "arc_easy").mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (tmp_path / "data" / "arc_easy" / "test.jsonl").write_text(rows)
    return tmp_path / "data"


@pytest.fixture
def checkpoint(checkpoint_of) -> Path:
    return checkpoint_of(MXInt(bits=3), method=LqerAct(), rank=4, activation=MXInt(bits=8))


@pytest.fixture
def native(checkpoint, tmp_path) -> Path:
    export(checkpoint, Native(), tmp_path / "native", check=False)
    return tmp_path / "native"


def scores(data_dir, **asked) -> dict:
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data_dir": str(data_dir)})
    found = lm_eval.simple_evaluate(tasks=["arc_easy_local"], task_manager=manager, bootstrap_iters=0, **asked)
    return {key: value for key, value in found["results"]["arc_easy_local"].items() if key.startswith("acc")}


def test_the_checkpoint_its_native_form_and_hf_score_the_same(checkpoint, native, data_dir):
    of_checkpoint, of_native = (
        scores(data_dir, model="lqer", model_args={"pretrained": str(folder), "device": "cpu"}, log_samples=False)
        for folder in (checkpoint, native)
    )
    of_hf = scores(data_dir, model="hf", model_args={"pretrained": str(native), "dtype": "float32"}, device="cpu")
    assert of_checkpoint == of_native == of_hf


def test_its_own_command_line_takes_the_model(native, data_dir, tmp_path):
    command = [
        *(sys.executable, "-c", "import sys; from lqer.cli import console; sys.exit(console())", "lm-eval", "run"),
        *("--model", "lqer", "--model_args", f"pretrained={native},dtype=float32", "--device", "cpu"),
        *("--tasks", "arc_easy_local", "--include_path", str(TASKS), "--batch_size", "4"),
        *("--metadata", json.dumps({"data_dir": str(data_dir)}), "--output_path", str(tmp_path / "scores.json")),
    ]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "|arc_easy_local|" in done.stdout
    (written,) = tmp_path.glob("scores*.json")
    found = json.loads(written.read_text())["results"]["arc_easy_local"]
    expected = scores(data_dir, model="lqer", model_args={"pretrained": str(native), "device": "cpu"})
    assert found["acc,none"] == expected["acc,none"]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"dtype": "int8"}, "dtype 'int8' is not one of auto"), ({"device_map": "all"}, "device_map 'all' is not one of")],
)
def test_options_that_do_not_exist_are_refused(native, options, says):
    with pytest.raises(ModelError, match=says):
        LqerLM(str(native), device="cpu", **options)
