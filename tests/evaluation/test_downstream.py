"""Downstream tasks against scores computed here, on a tiny model; every local YAML against the library's own."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from helpers import byte_tokenizer, tiny_llama
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from lqer.errors import ConfigError, DataError
from lqer.evaluation import harness
from lqer.evaluation.downstream import (
    TaskFiles,
    TaskResult,
    TaskSettings,
    check_tasks,
    evaluate_tasks,
    task_fingerprint,
)

TASKS = Path(__file__).parents[2] / "experiments" / "tasks"
LIBRARY = Path(lm_eval.tasks.__file__).parent
LIBRARY_YAMLS = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "rte": "glue/rte/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}

QUESTIONS = [
    {
        "question": f"What follows {number}?",
        "choices": {"text": [str(number + 1), f"{number} again", "nothing at all"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[number % 3],
    }
    for number in range(10)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write_rows(tmp_path / "data" / "arc_easy" / "test.jsonl", QUESTIONS)
    return tmp_path / "data"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(folder: Path, **texts: str) -> Path:
    """A folder of local tasks, each derived from arc_easy_local and reading its file."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text.replace("ARC_EASY", f"include: {TASKS / 'arc_easy_local.yaml'}"))
    return folder


def score(model, tokenizer, tasks, include_path=TASKS, data_dir=None, **settings) -> list[TaskResult]:
    settings = {"num_fewshot": 0, "limit": None, "batch_size": 4, "max_length": 512, "seed": 0, **settings}
    files = TaskFiles(tuple(tasks), include_path, data_dir)
    return evaluate_tasks(model, tokenizer, files, TaskSettings(**settings))


def best_answers(model, tokenizer, row: dict) -> tuple[int, int]:
    """The index of the likeliest choice, and of the likeliest per character."""
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
    sums, means = [], []
    for choice in row["choices"]["text"]:
        answer = tokenizer(" " + choice)["input_ids"]
        with torch.no_grad():
            log_p_TV = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0], dim=-1)
        sums.append(sum(log_p_TV[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)))
        means.append(sums[-1] / len(choice))
    return sums.index(max(sums)), means.index(max(means))


def test_accuracy_is_the_share_of_rows_whose_answer_is_the_likeliest_choice(model, tokenizer, data_dir):
    golds = ["ABC".index(row["answerKey"]) for row in QUESTIONS]
    best, best_per_character = zip(*(best_answers(model, tokenizer, row) for row in QUESTIONS), strict=True)
    results = score(model, tokenizer, ["arc_easy_local"], data_dir=data_dir)
    assert {result.metric: result.value for result in results} == {
        "acc": pytest.approx(sum(map(int.__eq__, best, golds)) / 10),
        "acc_norm": pytest.approx(sum(map(int.__eq__, best_per_character, golds)) / 10),
    }
    assert {(result.task, result.num_fewshot, result.samples) for result in results} == {("arc_easy_local", 0, 10)}


def test_a_mean_has_a_standard_error(model, tokenizer, data_dir):
    accuracy = score(model, tokenizer, ["arc_easy_local"], data_dir=data_dir)[0]
    assert accuracy.stderr == pytest.approx((accuracy.value * (1 - accuracy.value) / 9) ** 0.5)


def test_a_limit_takes_the_first_rows(model, tokenizer, data_dir):
    limited = score(model, tokenizer, ["arc_easy_local"], data_dir=data_dir, limit=4)
    write_rows(data_dir / "arc_easy" / "test.jsonl", QUESTIONS[:4])
    assert limited == score(model, tokenizer, ["arc_easy_local"], data_dir=data_dir)
    assert limited[0].samples == 4


def test_few_shot_results_are_fixed_by_the_seed(model, tokenizer, data_dir, tmp_path):
    write_rows(data_dir / "arc_easy" / "train.jsonl", QUESTIONS)
    files = "{test: arc_easy/test.jsonl, train: arc_easy/train.jsonl}"
    task = f"ARC_EASY\ntask: shots\ntraining_split: train\ndataset_kwargs: {{data_files: {files}}}\n"
    include_path = write_tasks(tmp_path / "tasks", shots=task)
    runs = [score(model, tokenizer, ["shots"], include_path, data_dir, num_fewshot=2, seed=seed) for seed in (1, 1)]
    assert runs[0] == runs[1]
    assert runs[0][0].num_fewshot == 2


def test_a_group_gives_its_tasks_and_its_aggregate(model, tokenizer, data_dir, tmp_path, monkeypatch):
    write_rows(data_dir / "first.jsonl", QUESTIONS[:2])
    include_path = write_tasks(
        tmp_path / "tasks",
        first="ARC_EASY\ntask: first\ndataset_kwargs: {data_files: {test: first.jsonl}}\n",
        second="ARC_EASY\ntask: second\n",
        both="group: both\ntask: [first, second]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
    )
    index = harness._index
    monkeypatch.setattr(harness, "_index", lambda folder, data_dir, library_tasks: index(folder, data_dir, False))
    results = {
        (result.task, result.metric): result for result in score(model, tokenizer, ["both"], include_path, data_dir)
    }
    assert set(results) == {(task, "acc") for task in ("first", "second", "both")} | {
        (task, "acc_norm") for task in ("first", "second")
    }
    first, second, both = (results[task, "acc"] for task in ("first", "second", "both"))
    assert both.value == pytest.approx((2 * first.value + 10 * second.value) / 12)
    assert both.samples == 12
    with pytest.raises(ConfigError, match="'first' is in both 'both' and 'first'"):
        check_tasks(TaskFiles(("both", "first"), include_path, data_dir))


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown task 'arc_easi'; the nearest is 'arc_easy'"):
        check_tasks(TaskFiles(("arc_easi",)))


def test_a_local_task_without_data_dir_is_refused():
    with pytest.raises(ConfigError, match=r"evaluation.downstream.data_dir must be set.*arc_easy/test.jsonl"):
        check_tasks(TaskFiles(("arc_easy_local",), TASKS))


def test_a_missing_file_is_refused_by_name(data_dir):
    with pytest.raises(ConfigError, match=r"evaluation.downstream.data_dir must hold 'piqa/validation.jsonl'"):
        check_tasks(TaskFiles(("arc_easy_local", "piqa_local"), TASKS, data_dir))


def test_a_missing_include_path_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"include_path must be a folder: found .*absent"):
        check_tasks(TaskFiles(("arc_easy_local",), tmp_path / "absent"))


def test_examples_from_the_judged_rows_are_refused(data_dir):
    with pytest.raises(ConfigError, match=r"num_fewshot must be 0 for 'arc_easy_local'.*found 5"):
        check_tasks(TaskFiles(("arc_easy_local",), TASKS, data_dir), num_fewshot=5)


@pytest.mark.parametrize(
    ("text", "reason"), [('{"question": "cut', "one JSON object"), ("[1]\n", "one JSON object"), ("\n", "one row")]
)
def test_a_damaged_file_is_refused_by_name(model, tokenizer, data_dir, text, reason):
    (data_dir / "arc_easy" / "test.jsonl").write_text(text)
    with pytest.raises(
        DataError, match=rf"arc_easy/test.jsonl must hold at least {reason}|test.jsonl must hold {reason}"
    ):
        score(model, tokenizer, ["arc_easy_local"], data_dir=data_dir)


def test_a_fingerprint_follows_content_and_not_place(data_dir, tmp_path):
    original = task_fingerprint(TaskFiles(("arc_easy_local",), TASKS, data_dir))
    shutil.copytree(TASKS, tmp_path / "copy")
    shutil.copytree(data_dir, tmp_path / "data copy")
    assert task_fingerprint(TaskFiles(("arc_easy_local",), tmp_path / "copy", tmp_path / "data copy")) == original

    write_rows(tmp_path / "data copy" / "arc_easy" / "test.jsonl", QUESTIONS[:9])
    assert task_fingerprint(TaskFiles(("arc_easy_local",), TASKS, tmp_path / "data copy")) != original

    shutil.copytree(TASKS, tmp_path / "edited")
    yaml = tmp_path / "edited" / "arc_easy_local.yaml"
    yaml.write_text(yaml.read_text().replace("Question", "Query"))
    assert task_fingerprint(TaskFiles(("arc_easy_local",), tmp_path / "edited", data_dir)) != original

    write_rows(data_dir / "arc_challenge" / "test.jsonl", QUESTIONS)
    assert task_fingerprint(TaskFiles(("arc_challenge_local",), TASKS, data_dir)) != task_fingerprint(
        TaskFiles(("arc_challenge_local",), tmp_path / "edited", data_dir)
    )


def as_text(value):
    return inspect.getsource(value) if callable(value) else value


@pytest.mark.parametrize("name", LIBRARY_YAMLS)
def test_a_local_task_asks_and_judges_as_the_librarys_does(name):
    local = load_yaml(TASKS / f"{name}_local.yaml")
    library = load_yaml(LIBRARY / LIBRARY_YAMLS[name])
    for key in (
        "output_type",
        "process_docs",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "description",
        "target_delimiter",
        "generation_kwargs",
        "filter_list",
        "metadata",
    ):
        assert as_text(local.get(key)) == as_text(library.get(key)), key
    assert [metric["metric"] for metric in local["metric_list"]] == [
        metric["metric"] for metric in library["metric_list"]
    ]
    judged = library.get("test_split") or library["validation_split"]
    assert (local.get("test_split") or local["validation_split"]) == judged
    assert local["dataset_kwargs"]["data_files"] == {judged: f"{name}/{judged}.jsonl"}


def test_every_local_task_has_its_counterpart():
    assert sorted(path.stem for path in TASKS.glob("*.yaml")) == sorted(f"{name}_local" for name in LIBRARY_YAMLS)


def test_every_local_task_scores_real_rows(assets: Path):
    folder = assets / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tasks = [f"{name}_local" for name in LIBRARY_YAMLS]
    results = score(model, tokenizer, tasks, data_dir=assets / "tasks", limit=4, max_length=256)
    assert {result.task for result in results} == set(tasks)
    assert all(result.samples == 4 for result in results)
    assert all(0 <= result.value <= 1 for result in results if result.metric != "perplexity")
