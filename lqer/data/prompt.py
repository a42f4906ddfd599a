"""Text from rows of several columns: a template, and for a multiple-choice task the choice that the label selects.

winogrande: template = "{sentence}", blank = "_", label = "answer", choices = { 1 = "{option1}", 2 = "{option2}" }
rte:        template = "{sentence1} {sentence2}? {choice}", label = "label", choices = { 0 = "True", 1 = "False" }
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
# A column, and indices into lists and tables in it: `question`, `endings[2]`, `choices[text][0]`.
PLACE = re.compile(r"[^\[\]]+(\[[^\[\]]+\])*")


class Prompt(BaseModel):
    """How a row becomes text: `{template = "{question} {answer}"}`, or just the template."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: str  # {column} is the value of that column, {choice} the selected choice; {{ and }} are braces
    label: str | None = None  # the column that selects a choice
    choices: dict[str, str] = {}  # a template for each value of the label
    blank: str | None = None  # without {choice}: the part of the text that the choice replaces

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"template": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        places = _places("template", self.template)
        for key, choice in self.choices.items():
            if CHOICE in _places(f"choices.{key}", choice):
                raise ValueError(f"choices.{key} contains {{choice}}, which is allowed only in template")
        if not places:
            raise ValueError(f"template {self.template!r} names no {{column}}")
        if bool(self.choices) != (self.label is not None):
            raise ValueError("label names the column that selects one of choices: set both or neither")
        if self.choices and (CHOICE in places) == (self.blank is not None):
            raise ValueError("the choice replaces either {choice} in template or blank: use exactly one of them")
        if self.blank is not None and not (self.choices and self.blank):
            raise ValueError(f"blank is {self.blank!r}; it must be the text that one of choices replaces")
        return self

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row. Raises ValueError if the row lacks a column or choice that the prompt uses."""
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
            raise ValueError(f"blank {self.blank!r} must occur once, not {len(after)} times")
        return before + choice + after[0]


def column_text(column: str, row: Mapping[str, Any]) -> str:
    """Return the text in one column. Raises ValueError if there is none."""
    if column not in row:
        raise _missing(column, row)
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} must hold text, not {type(row[column]).__name__}")
    return row[column]


def _places(key: str, template: str) -> set[str]:
    """The places of a template. Raises ValueError, naming its `key`, if it is not a template."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{key} {template!r} is not a template: {error}") from None
    for _, place, form, conversion in parsed:
        if place is not None and (form or conversion or not PLACE.fullmatch(place)):
            raise ValueError(f"{key} {template!r} may refer to columns only as {{column}} or {{column[index]}}")
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
            raise ValueError(f"column {column!r} has nothing at {place!r}") from None
    return value


def _missing(column: str, row: Mapping[str, Any]) -> ValueError:
    return ValueError(f"no column {column!r}; it has {', '.join(row) or 'none'}{did_you_mean(column, row)}")
