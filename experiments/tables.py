"""The tables of README.md and docs/, made from files of rows.

    python experiments/tables.py fill [PAGE ...]     write the tables of the pages (default: README.md and docs/**/*.md)
    python experiments/tables.py check [PAGE ...]    exit status 1 if a page shows anything else than its files say
    python experiments/tables.py add FILE.json RESULTS.json ... --model NAME --command COMMAND [--scheme NAME]
        [--text LABEL=NAME ...] [--hardware NAME] [--date YYYY-MM-DD]
    python experiments/tables.py add-sweep FILE.json OUTPUT_DIR/TAG-table --model NAME
        [--text LABEL=NAME ...] [--hardware NAME] [--date YYYY-MM-DD]
    BENCHMARK | python experiments/tables.py take FILE.csv [--table N]     what a benchmark printed, for `printed`

A file of rows (docs/results/data/*.json) is a list of objects with the keys of `Row`. A page marks a table by

    <!-- table results/data/trellis.json columns=bits,perplexity,scheme model="SmolLM2-135M" scheme="trellis*" -->
    <!-- end of table -->

with one or more files relative to the page, the columns in their order (default: model, scheme, bits, perplexity, kl),
patterns that a row must match (`model=`, `scheme=`, `by=`, `activations=`; several of one key: any of them), and
`sort=bits` for another order than that of the files: each model's rows by falling bits. `perplexity` and `kl` are one
column for each text, `accuracy` is the mean over tasks, `minutes` are those of calibration, quantization and training.
A column of facts that no row has is left out. A value is bold if every other row of its model at the same or fewer bits
has a higher one; a scheme links to the line of its command.
`preset="trellis, 2 bits*=best-2"`, repeatable, says which preset of configs/ makes the rows that match: the column
`preset`.

`add` takes results.json of runs and lines that experiments/compare_peers.py wrote (as "theirs"), replaces the rows of
the same model and scheme, and adds the row of the original model. `{tag}` in COMMAND is the tag of the run. `add-sweep`
takes every finished run of a sweep, under its name in the sweep, with the command that repeats it. Tables of benchmarks
are no rows of runs: page_tables/printed.py keeps what was printed; page_tables/steps.py: what a part gives,
from two rows that differ in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from page_tables import printed, steps
from page_tables.rows import ORIGINAL, ROWS, Row, merged, numbered_rows, read_rows, rows_of, rows_of_sweep

from lqer.config.presets import preset_path
from lqer.errors import ConfigError, DataError, LqerError
from lqer.store.files import write_text

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- table (?P<arguments>.*?) -->\n)(?P<body>.*?)(<!-- end of table -->)", re.DOTALL)
COLUMNS = (
    "model", "scheme", "bits", "activations", "perplexity", "kl", "accuracy", "minutes", "GB", "peak GB", "tokens/s",
    "preset", "hardware", "date", "command",
)  # fmt: skip
DEFAULT_COLUMNS = ("model", "scheme", "bits", "perplexity", "kl")
# Facts that a row may lack, by their column.
OPTIONAL = {
    "accuracy": "accuracy", "minutes": "minutes", "GB": "gb", "peak GB": "peak_gb", "tokens/s": "tokens_per_second",
}  # fmt: skip
FILTERS = ("model", "scheme", "by", "activations")
NOTE = """Bold: the best of the model's rows with as many or fewer bits. A scheme links to the command that repeats
its row, with hardware and date."""
# From here on a perplexity is shown as a power of ten: the model is ruined, digits mean nothing.
RUINED = 1e4


def filled(page: Path) -> str:
    """The text of a page with every table written anew."""
    text = steps.filled(page, printed.filled(page, page.read_text()))
    return TABLE.sub(lambda found: f"{found[1]}\n{_region(page, found['arguments'])}\n{found[4]}", text)


def _region(page: Path, arguments: str) -> str:
    files, options = _parse(page, arguments)
    read = [(row, f"{file}#L{line}") for file in files for row, line in numbered_rows(page.parent / file)]
    # Files about one model both have the row of the original.
    found = merged([], [row for row, _ in read])
    links = {(row.model, row.scheme): link for row, link in read}
    rows = [row for row in found if _is_wanted(row, options)]
    if not rows:
        raise DataError(f"{page}: no row for the table {arguments}")
    if "sort" in options:
        models = list(dict.fromkeys(row.model for row in rows))
        rows.sort(key=lambda row: (models.index(row.model), -row.bits))
    columns = options["columns"][0].split(",") if "columns" in options else list(DEFAULT_COLUMNS)
    presets = dict(option.rsplit("=", 1) for option in options.get("preset", ()))
    return f"{markdown(rows, columns, presets, links)}\n\n{NOTE}\n"


def _parse(page: Path, arguments: str) -> tuple[list[str], dict[str, list[str]]]:
    files: list[str] = []
    options: dict[str, list[str]] = {}
    for word in shlex.split(arguments):
        key, equals, value = word.partition("=")
        if not equals:
            files.append(word)
        else:
            options.setdefault(key, []).append(value)
    allowed = (*FILTERS, "columns", "sort", "preset")
    if unknown := [key for key in options if key not in allowed]:
        raise ConfigError(f"{page}: table: unknown key {unknown[0]!r}; allowed: {', '.join(allowed)}")
    for option in options.get("preset", ()):
        if "=" not in option:
            raise ConfigError(f"{page}: table: preset: must have the form SCHEME=NAME; found {option!r}")
        preset_path(option.rsplit("=", 1)[1])
    if options.get("sort", ["bits"]) != ["bits"]:
        raise ConfigError(f"{page}: table: sort: must be bits; found {options['sort'][0]!r}")
    for column in options.get("columns", [",".join(DEFAULT_COLUMNS)])[0].split(","):
        if column not in COLUMNS:
            raise ConfigError(f"{page}: table: unknown column {column!r}; allowed: {', '.join(COLUMNS)}")
    return files, options


def _is_wanted(row: Row, options: Mapping[str, Sequence[str]]) -> bool:
    return all(
        any(fnmatchcase(getattr(row, key), pattern) for pattern in options[key]) for key in FILTERS if key in options
    )


def markdown(
    rows: Sequence[Row],
    columns: Sequence[str],
    presets: Mapping[str, str] | None = None,
    links: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """The table; a model is named in the first of its rows.

    presets: their names by a pattern of schemes. links: where the rows are, by model and scheme.
    """
    # A column of nothing: no library of these rows was timed, say.
    columns = [column for column in columns if column not in OPTIONAL or any(_fact(row, column) for row in rows)]
    headings: list[str] = []
    cells: list[list[str]] = [[] for _ in rows]
    for column in columns:
        if column in ("perplexity", "kl"):
            for text in dict.fromkeys(text for row in rows for text in getattr(row, column)):
                headings.append(text if column == "perplexity" else f"KL {text}")
                best = {id(row) for row in front(rows, column, text)}
                for row, line in zip(rows, cells, strict=True):
                    shown = _shown(getattr(row, column).get(text), column)
                    line.append(f"**{shown}**" if id(row) in best else shown)
        else:
            headings.append(column)
            previous = None
            for row, line in zip(rows, cells, strict=True):
                shown = _preset(row, presets or {}) if column == "preset" else _fact(row, column)
                if column == "scheme" and links is not None:
                    shown = f"[{shown}]({links[row.model, row.scheme]})"
                line.append("" if column == "model" and shown == previous else shown)
                previous = shown
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (headings, *cells)]
    return "\n".join([lines[0], "|" + "---|" * len(headings), *lines[1:]])


def front(rows: Sequence[Row], column: str, text: str) -> Iterator[Row]:
    """The quantized rows that are better than, or as good as, every other one of their model at the same or fewer bits.

    None where one of these has not been measured: nobody knows then.
    """
    quantized = [row for row in rows if row.by != ORIGINAL]
    for row in quantized:
        rivals = [other for other in quantized if other.model == row.model and other.bits <= row.bits]
        values = [getattr(other, column).get(text) for other in rivals]
        if None not in values and getattr(row, column)[text] == min(values):
            yield row


def _shown(value: float | None, column: str) -> str:
    if value is None:
        return ""
    if column == "kl":
        return f"{value:.3f}"
    return f"{value:.1e}".replace("e+0", "e") if value >= RUINED else f"{value:#.4g}".rstrip(".")


def _preset(row: Row, presets: Mapping[str, str]) -> str:
    found = [name for pattern, name in presets.items() if fnmatchcase(row.scheme, pattern)]
    return f"`{found[0]}`" if found and row.by == "ours" else ""


def _fact(row: Row, column: str) -> str:
    if column == "scheme":
        return f"{row.scheme} (theirs)" if row.by == "peer" else row.scheme
    if column in OPTIONAL:
        value = getattr(row, OPTIONAL[column])
        if value is None:
            return ""
        if column == "accuracy":
            return f"{value:.3f}" + ("" if row.accuracy_error is None else f" ± {row.accuracy_error:.3f}")
        return f"{value:.{3 if value < 1000 else 4}g}"
    if column == "bits":
        return f"{row.bits:.3f}" if row.by != ORIGINAL else f"{row.bits:g}"
    return f"`{row.command}`" if column == "command" else str(getattr(row, column))


def add(arguments: argparse.Namespace) -> None:
    if arguments.scheme and len(arguments.results) > 1:
        raise ConfigError("--scheme names one run; found several")
    facts = {key: getattr(arguments, key) for key in ("model", "command", "date", "scheme", "hardware")}
    texts, new = _texts(arguments), []
    for path in arguments.results:
        try:
            text = path.read_text(encoding="utf-8")
            found = [json.loads(text)] if path.name.endswith(".json") else map(json.loads, text.splitlines())
            new += [row for results in found for row in rows_of(results, texts=texts, **facts)]
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: neither results.json nor lines of compare_peers.py: {error}") from None
    _write(arguments.file, new)


def add_sweep(arguments: argparse.Namespace) -> None:
    facts = {key: getattr(arguments, key) for key in ("model", "date", "hardware")}
    _write(arguments.file, rows_of_sweep(arguments.table, texts=_texts(arguments), **facts))


def _texts(arguments: argparse.Namespace) -> dict[str, str]:
    if wrong := [text for text in arguments.text if "=" not in text]:
        raise ConfigError(f"--text {wrong[0]}: must have the form LABEL=NAME")
    return dict(text.split("=", 1) for text in arguments.text)


def _write(file: Path, new: Sequence[Row]) -> None:
    """Replace and add rows of a file, with the keys that say something."""
    rows = merged(read_rows(file) if file.exists() else [], new)
    told = ROWS.dump_python(rows, mode="json", exclude_none=True)
    told = [{key: value for key, value in row.items() if value != ""} for row in told]
    write_text(file, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    print(f"{file}: {len(rows)} rows")


def take(arguments: argparse.Namespace) -> None:
    printed.take(sys.stdin.read(), arguments.table, arguments.file)
    print(arguments.file)


def fill(pages: Sequence[Path], check_only: bool) -> int:
    stale = [page for page in pages if filled(page) != page.read_text()]
    for page in stale:
        if not check_only:
            write_text(page, filled(page))
        print(f"{os.path.relpath(page)}: {'is not what its files say' if check_only else 'written'}")
    return int(check_only and bool(stale))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="does", required=True)
    for name in ("fill", "check"):
        commands.add_parser(name).add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    facts = argparse.ArgumentParser(add_help=False)
    facts.add_argument("file", type=Path, metavar="FILE.json")
    facts.add_argument("--model", required=True)
    facts.add_argument("--text", action="append", default=[], metavar="LABEL=NAME")
    facts.add_argument("--hardware")
    facts.add_argument("--date", default=datetime.date.today().isoformat())
    adding = commands.add_parser("add", parents=[facts])
    adding.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    adding.add_argument("--command", required=True)
    adding.add_argument("--scheme")
    adding.set_defaults(run=add)
    adding = commands.add_parser("add-sweep", parents=[facts])
    adding.add_argument("table", type=Path, metavar="OUTPUT_DIR/TAG-table")
    adding.set_defaults(run=add_sweep)
    taking = commands.add_parser("take")
    taking.add_argument("file", type=Path, metavar="FILE.csv")
    taking.add_argument("--table", type=int, default=1, metavar="N")
    taking.set_defaults(run=take)
    arguments = parser.parse_args()
    try:
        if "run" in arguments:
            arguments.run(arguments)
            return 0
        pages = arguments.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        return fill(pages, arguments.does == "check")
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
