"""Tables that a benchmark printed, kept as docs/results/data/*/*.csv: the cells of a page that are not rows of runs.

A page marks such a table by

    <!-- printed data/kernels/experts.csv -->
    <!-- end of table -->

with one file relative to the page. The paragraphs around it name the command that printed it, the machine and the date.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from lqer.errors import DataError
from lqer.store.files import write_text

PRINTED = re.compile(r"(<!-- printed (?P<file>\S+) -->\n)(?P<body>.*?)(<!-- end of table -->)", re.DOTALL)
# Of the line between the headings and the rows.
RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")


def filled(page: Path, text: str) -> str:
    """The text of a page with every printed table written anew."""
    return PRINTED.sub(lambda found: f"{found[1]}\n{markdown(read(page.parent / found['file']))}\n\n{found[4]}", text)


def read(path: Path) -> list[list[str]]:
    """The headings and the rows. Raises DataError, one line, for a file that is no table."""
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if len(rows) < 2:
        raise DataError(f"{path}: a table has a line of headings and a row; found {len(rows)} lines")
    if wrong := [i for i, row in enumerate(rows, 1) if len(row) != len(rows[0])]:
        raise DataError(f"{path}: line {wrong[0]} has {len(rows[wrong[0] - 1])} cells, the headings {len(rows[0])}")
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def take(printed: str, number: int, path: Path) -> None:
    """Write a table of a markdown text, counted from 1, to a file. Raises DataError where there is none."""
    found = tables(printed)
    if not 1 <= number <= len(found):
        raise DataError(f"table {number}: the text has {len(found)} tables")
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(found[number - 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, lines.getvalue())


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a markdown text: their headings and rows."""
    lines = [line.strip() for line in text.splitlines()]
    found = []
    for i, line in enumerate(lines):
        if i and RULE.fullmatch(line) and lines[i - 1].startswith("|"):
            end = next((j for j in range(i, len(lines)) if not lines[j].startswith("|")), len(lines))
            found.append([cells(row) for row in (lines[i - 1], *lines[i + 1 : end])])
    return found


def cells(line: str) -> list[str]:
    """Of one line of a table; a bar after a backslash belongs to its cell."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
