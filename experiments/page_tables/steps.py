"""Tables of steps: what one part gave and cost, from the two rows that differ in it and in nothing else.

A page marks such a table by

    <!-- steps data/steps.json -->
    <!-- end of table -->

with one file relative to the page: a list of objects with the keys of `Step`, whose rows lie in files beside it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lqer.errors import DataError
from page_tables.rows import Row, numbered_rows

TEXTS = ("WikiText-2", "C4")
STEPS = re.compile(r"(<!-- steps (?P<file>\S+) -->\n)(?P<body>.*?)(<!-- end of table -->)", re.DOTALL)


class Step(BaseModel):
    """file: of the rows, beside that of the steps. without, with_part: their schemes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    model: str
    file: str
    without: str
    with_part: str


def filled(page: Path, text: str) -> str:
    """The text of a page with every table of steps written anew."""
    return STEPS.sub(lambda found: f"{found[1]}\n{_table(page, found['file'])}\n\n{found[4]}", text)


def read(path: Path) -> list[Step]:
    """Raises DataError, one line, for a file that is no list of steps."""
    try:
        return TypeAdapter(list[Step]).validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _table(page: Path, file: str) -> str:
    path = page.parent / file
    found = cache(
        lambda name: {(row.model, row.scheme): (row, line) for row, line in numbered_rows(path.parent / name)}
    )
    lines, previous = [], None
    for step in read(path):
        pair, links = [], []
        for which, scheme in (("without", step.without), ("with", step.with_part)):
            if (step.model, scheme) not in found(step.file):
                raise DataError(f"{path}: {step.part}: {step.file} has no row {scheme!r} of {step.model}")
            row, line = found(step.file)[step.model, scheme]
            pair.append(row)
            links.append(f"[{which}]({posixpath.normpath(f'{posixpath.dirname(file)}/{step.file}')}#L{line})")
        lines.append(["" if step.part == previous else step.part, step.model, *_changes(*pair), ", ".join(links)])
        previous = step.part
    headings = ["part", "model", *TEXTS, *(f"KL {text}" for text in TEXTS), "minutes", "rows"]
    told = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (headings, *lines)]
    return "\n".join([told[0], "|" + "---|" * len(headings), *told[1:]])


def _changes(before: Row, after: Row) -> Sequence[str]:
    def each(one: Mapping[str, float], other: Mapping[str, float], form: str) -> list[str]:
        return [_change(one.get(text), other.get(text), form) for text in TEXTS]

    # Of different sessions they say nothing about the part.
    timed = before.hardware == after.hardware and None not in (before.minutes, after.minutes)
    minutes = f"{before.minutes:.3g} to {after.minutes:.3g}" if timed else ""
    return [*each(before.perplexity, after.perplexity, "#.4g"), *each(before.kl, after.kl, ".3f"), minutes]


def _change(before: float | None, after: float | None, form: str) -> str:
    if before is None or after is None:
        return ""
    return f"{before:{form}} to {after:{form}} ({100 * (after / before - 1):+.1f} %)"
