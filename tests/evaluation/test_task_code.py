"""Code of task folders runs only where the configuration trusts it; templates cannot reach beyond their values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError

from lqer.errors import ConfigError
from lqer.evaluation.downstream import TaskFiles, check_task_data
from lqer.evaluation.task_code import LOCAL_LOADER, sandbox_templates

TASK = """
task: {name}
custom_dataset: !function {loader}
dataset_kwargs:
  data_files: {{test: rows.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: {target}
metric_list:
  - metric: {metric}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (tmp_path / "code.py").write_text(f"{code}from {LOCAL_LOADER.rpartition('.')[0]} import load_jsonl\n")
    return tmp_path


def load(
    folder: Path,
    trust_code: bool = False,
    loader: str = LOCAL_LOADER,
    target: str = '"{{text}}"',
    metric: str = "word_perplexity",
) -> None:
    # A name of its own: the library's index is read once per folder.
    name = f"task{len(list(folder.glob('*.yaml')))}"
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, loader=loader, target=target, metric=metric))
    check_task_data(TaskFiles((name,), folder, folder, trust_code))


def test_a_task_that_only_names_the_loader_of_local_tasks_needs_no_trust(folder):
    load(folder)


@pytest.mark.parametrize("options", [{"loader": "code.load_jsonl"}, {"target": "!function code.load_jsonl"}])
def test_code_next_to_a_task_is_refused_before_it_runs(folder, options):
    with pytest.raises(ConfigError, match=r"runs Python code \(code\.load_jsonl\): .*trust_code = true"):
        load(folder, **options)
    assert not (folder / "ran").exists()


def test_a_metric_that_would_be_loaded_as_code_is_refused_before_it_runs(folder):
    (folder / "metric").mkdir()
    (folder / "metric" / "metric.py").write_text((folder / "code.py").read_text())
    metric = str(folder / "metric")
    with pytest.raises(ConfigError, match=r"the metric .*metric' of a task is not lm-eval's own: .*trust_code = true"):
        load(folder, metric=metric)
    assert not (folder / "ran").exists()


def test_a_metric_of_the_evaluate_library_is_refused(folder):
    with pytest.raises(ConfigError, match="the metric 'f1' of a task is not lm-eval's own"):
        load(folder, metric="f1\n    hf_evaluate: true")


def test_trusted_code_runs(folder):
    load(folder, trust_code=True, loader="code.load_jsonl")
    assert (folder / "ran").exists()


@pytest.mark.parametrize("name", ["os.system", "../code.load_jsonl"])
def test_functions_of_other_modules_are_refused_too(folder, name):
    with pytest.raises(ConfigError, match="runs Python code"):
        load(folder, loader=name)


def test_a_task_that_scores_documents_cannot_be_run_block_by_block(folder):
    load(folder)
    with pytest.raises(ConfigError, match=r"blockwise must be false with task 'task0', which asks for .*rolling"):
        check_task_data(TaskFiles(("task0",), folder, folder), blockwise=True)


def test_a_file_that_takes_the_name_of_the_loader_is_refused(folder):
    impostor = folder / "lqer/evaluation/harness.py"
    impostor.parent.mkdir(parents=True)
    (folder / "code.py").rename(impostor)
    with pytest.raises(ConfigError, match="runs Python code"):
        load(folder)
    assert not (folder / "ran").exists()


def test_a_template_cannot_reach_beyond_its_values():
    from lm_eval import utils

    sandbox_templates()
    assert utils.apply_template("{{ a | upper }}-{{ a | regex_replace('x', 'y') }}", {"a": "x"}) == "X-y"
    with pytest.raises(SecurityError):
        utils.apply_template("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})
