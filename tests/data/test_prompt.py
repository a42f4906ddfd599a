"""Rows of several columns as text: what a template takes from them, and what is said where it cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from lqer.data.datasets import DatasetSpec, load_rows
from lqer.data.prompt import Prompt
from lqer.errors import DataError

WINOGRANDE: dict[str, Any] = {
    "template": "{sentence}\n",
    "blank": "_",
    "label": "answer",
    "choices": {"1": "{option1}", "2": "{option2}"},
}
RTE: dict[str, Any] = {
    "template": "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer: {choice}",
    "label": "label",
    "choices": {"0": "True", "1": "False"},
}
WINOGRANDE_ROW = {
    "sentence": "The cup did not fit, the _ was large.",
    "option1": "cup",
    "option2": "box",
    "answer": "1",
}


def fault(prompt: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Prompt.model_validate(prompt)
    return caught.value.errors()[0]["msg"]


def test_a_string_is_a_template():
    prompt = Prompt.model_validate("{question} ({id}) {{so}} {answer}")
    assert prompt.text({"question": "Why?", "answer": "{id}", "id": 3, "other": None}) == "Why? (3) {so} {id}"


def test_the_label_picks_what_the_blank_stands_for():
    prompt = Prompt(**WINOGRANDE)
    assert prompt.text(WINOGRANDE_ROW) == "The cup did not fit, the cup was large.\n"
    assert prompt.text(WINOGRANDE_ROW | {"answer": 2}) == "The cup did not fit, the box was large.\n"


@pytest.mark.parametrize(("label", "answer"), [(0, "True"), ("1", "False")])
def test_the_label_picks_the_choice_of_the_template(label, answer):
    row = {"sentence1": "A dog barks.", "sentence2": "A dog_{choice} sleeps.", "label": label}
    expected = f"A dog barks.\nQuestion: A dog_{{choice}} sleeps. True or False?\nAnswer: {answer}"
    assert Prompt(**RTE).text(row) == expected


def test_a_truth_value_is_a_label_as_json_spells_it():
    prompt = Prompt(template="{q} {choice}", label="answer", choices={"true": "yes", "false": "no"})
    assert prompt.text({"q": "So?", "answer": True}) == "So? yes"


def test_places_reach_into_lists_and_tables():
    prompt = Prompt(
        template="{ctx} {choice}", label="key", choices={"A": "{choices[text][0]}", "B": "{choices[text][1]}"}
    )
    row = {"ctx": "It is", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "key": "B"}
    assert prompt.text(row) == "It is blue"
    with pytest.raises(ValueError, match=r"^column 'choices' has nothing at 'choices\[text\]\[1\]'$"):
        prompt.text(row | {"choices": {"text": ["red"]}})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("no column", "template 'no column' names no {column}"),
        ("{a", "template '{a' is not a template: expected '}' before end of string"),
        ("{}", "may refer to columns only as {column} or {column[index]}"),
        ("{a:>9}", "may refer to columns only as"),
        ("{a!r}", "may refer to columns only as"),
        ("{a[0}", "is not a template"),
        ({"template": "{a}", "lable": "b"}, "Extra inputs"),
        ({"template": "{a}", "label": "b"}, "label names the column that selects one of choices: set both or neither"),
        ({"template": "{a} {choice}", "choices": {"1": "x"}}, "set both or neither"),
        ({"template": "{a}", "blank": "_"}, "blank is '_'; it must be the text that one of choices replaces"),
        (WINOGRANDE | {"blank": ""}, "blank is ''"),
        (WINOGRANDE | {"blank": None}, "either {choice} in template or blank: use exactly one of them"),
        (RTE | {"blank": "_"}, "either {choice} in template or blank: use exactly one of them"),
        (RTE | {"choices": {"0": "{choice}"}}, "choices.0 contains {choice}, which is allowed only in template"),
        (RTE | {"choices": {"0": "{x"}}, "choices.0 '{x' is not a template"),
    ],
)
def test_a_prompt_that_is_none_has_its_fault_named(prompt, message):
    assert message in fault(prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"option1": None}, "column 'option1' must hold text or a number, not NoneType"),
        ({"answer": ""}, "label 'answer' is ''; choices has 1, 2"),
        ({"answer": None}, "label 'answer' is 'null'; choices has 1, 2"),
        ({"sentence": "No gap."}, "blank '_' must occur once, not 0 times"),
        ({"sentence": "_ and _"}, "blank '_' must occur once, not 2 times"),
    ],
)
def test_what_a_row_must_hold(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Prompt(**WINOGRANDE).text(WINOGRANDE_ROW | change)


class TestDataset:
    def write(self, folder, *rows: object) -> str:
        path = folder / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def test_rows_are_documents_made_by_the_prompt(self, tmp_path):
        path = self.write(tmp_path, WINOGRANDE_ROW, WINOGRANDE_ROW | {"answer": "2"}, WINOGRANDE_ROW)
        read = load_rows(DatasetSpec(path=path, prompt=Prompt(**WINOGRANDE), rows=":2"), "calibration")
        assert list(read.rows) == [f"The cup did not fit, the {name} was large.\n" for name in ("cup", "box")]
        assert read.documents

    def test_the_row_and_the_column_that_it_lacks_are_named(self, tmp_path):
        path = self.write(tmp_path, WINOGRANDE_ROW, {"sentence": "a _", "opt1": "b", "answer": "1"})
        with pytest.raises(DataError) as caught:
            list(load_rows(DatasetSpec(path=path, prompt=Prompt(**WINOGRANDE)), "calibration").rows)
        expected = "dataset a.jsonl, row 1: no column 'option1'; it has sentence, opt1, answer; did you mean 'opt1'?"
        assert str(caught.value) == expected

    @pytest.mark.parametrize("path", ["pydoc", "a.txt"])
    def test_what_has_no_columns_takes_no_prompt(self, path):
        with pytest.raises(ValidationError, match=f"a prompt needs rows with columns; {path} has none"):
            DatasetSpec(path=path, prompt=Prompt(template="{text}"))

    @pytest.mark.parametrize(("task", "prompt"), [("winogrande", WINOGRANDE), ("rte", RTE)])
    def test_real_tasks_are_text(self, assets, task, prompt):
        path = assets / f"tasks/{task}/validation.jsonl"
        rows = list(load_rows(DatasetSpec(path=str(path), prompt=Prompt(**prompt)), "calibration").rows)
        assert len(rows) == len(path.read_text().splitlines())
        if task == "winogrande":
            assert rows[0] == "Sarah was a much better surgeon than Maria so Maria always got the easier cases.\n"
        else:
            assert rows[0].endswith("Question: Christopher Reeve had an accident. True or False?\nAnswer: False")
