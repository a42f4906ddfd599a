"""Text from rows of several columns: a template, and of a multiple-choice task the choice that its label picks.

Of winogrande: template = "{sentence}", blank = "_", label = "answer", choices = { 1 = "{option1}", 2 = "{option2}" }
Of rte: template = "{sentence1} {sentence2}? {choice}", label = "label", choices = { 0 = "True", 1 = "False" }
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from lqer.components import did_you_mean

CHOICE = "choice"
# A column, and what is taken out of lists and tables in it: `question`, `endings[2]`, `choices[text][0]`.
PLACE = re.compile(r"[^\[\]]+(\[[^\[\]]+\])*")


class Prompt(BaseModel):
    """How a row becomes text: `{template = "{question} {answer}"}`, or just the template."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: str  # {column} is what the row holds there, {choice} the choice picked; {{ and }} are braces
    label: str | None = None  # the column that picks a choice
    choices: dict[str, str] = {}  # a template for every value of the label
    blank: str | None = None  # without {choice}: what of the text the choice replaces

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"template": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        places = _places("template", self.template)
        for key, choice in self.choices.items():
            if CHOICE in _places(f"choices.{key}", choice):
                raise ValueError(f"choices.{key} holds {{choice}}, which only template can")
        if not places:
            raise ValueError(f"template {self.template!r} names no {{column}}")
        if bool(self.choices) != (self.label is not None):
            raise ValueError("label names the column that picks one of choices: it takes both or none")
        if self.choices and (CHOICE in places) == (self.blank is not None):
            raise ValueError("the choice takes the place either of {choice} in template or of blank: give one of them")
        if self.blank is not None and not (self.choices and self.blank):
            raise ValueError(f"blank is {self.blank!r}; it must be text that one of choices takes the place of")
        return self

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row. Raises ValueError where the row does not hold what the prompt takes from it."""
        if self.label is None:
            return _filled(self.template, row)
        value = _at(self.label, row)
        value = value if isinstance(value, str) else json.dumps(value)
        if value not in self.choices:
            raise ValueError(f"label {self.label!r} is {value!r}; choices has {', '.join(self.choices)}")
        choice = _filled(self.choices[value], row)
        if self.blank is None:
            return _filled(self.template, {**row, CHOICE: choice})
        before, *after = _filled(self.template, row).split(self.blank)
        if len(after) != 1:
            raise ValueError(f"blank {self.blank!r} must be there once, not {len(after)} times")
        return before + choice + after[0]


def column_text(column: str, row: Mapping[str, Any]) -> str:
    """Return the text in one column. Raises ValueError where the row has none there."""
    if column not in row:
        raise _missing(column, row)
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} must hold text, not {type(row[column]).__name__}")
    return row[column]


def _places(key: str, template: str) -> set[str]:
    """The places of a template. Raises ValueError, naming its `key`, for what is none."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{key} {template!r} is no template: {error}") from None
    for _, place, form, conversion in parsed:
        if place is not None and (form or conversion or not PLACE.fullmatch(place)):
            raise ValueError(f"{key} {template!r} must hold columns as {{column}} or {{column[index]}} and no more")
    return {place for _, place, _, _ in parsed if place is not None}


def _filled(template: str, row: Mapping[str, Any]) -> str:
    pieces = string.Formatter().parse(template)
    return "".join(literal + ("" if place is None else _text_at(place, row)) for literal, place, _, _ in pieces)


def _text_at(place: str, row: Mapping[str, Any]) -> str:
    value = _at(place, row)
    if not isinstance(value, str | int | float):
        raise ValueError(f"column {place!r} must hold text or a number, not {type(value).__name__}")
    return str(value)


def _at(place: str, row: Mapping[str, Any]) -> Any:
    column, *steps = re.findall(r"[^\[\]]+", place)
    if column not in row:
        raise _missing(column, row)
    value = row[column]
    for step in steps:
        try:
            value = value[step] if isinstance(value, Mapping) else value[int(step)]
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"column {column!r} holds nothing at {place!r}") from None
    return value


def _missing(column: str, row: Mapping[str, Any]) -> ValueError:
    return ValueError(f"no column {column!r}; it has {', '.join(row) or 'none'}{did_you_mean(column, row)}")
