"""Texts by name, and the token windows that calibration reads from them.

A text is a sequence of rows, of one of two kinds, which decides how it is tokenized:

    documents   each row is tokenized by itself, with the special tokens that the tokenizer adds: .jsonl and .parquet
                records, c4, slimpajama-6b, pydoc, stdlib, any hub id. Empty rows are skipped.
    lines       the rows are pieces of one running text: .txt, wikitext2, ptb. They are joined and tokenized as one
                string, so special tokens occur only at its start.

Rows are read once, in order, and only as far as needed: calibration stops when it has enough tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from lqer.components import did_you_mean
from lqer.data.hub import hub_out_of_reach
from lqer.data.prompt import Prompt, column_text
from lqer.data.python_texts import PYTHON_TEXTS, PythonText
from lqer.errors import DataError, HubTextError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Purpose = Literal["calibration", "evaluation"]
TextOf = Callable[[Mapping[str, Any]], str]
FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
# JSON can spell half of a surrogate pair; tokenizers refuse it.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A row number or a percentage of the rows on either side of the colon; either may be absent.
ROW_RANGE = re.compile(r"(\d+|(100|\d\d?)%)?:(\d+|(100|\d\d?)%)?")
# The first ids of a running text come from a prefix of it; ids this close to the end of the prefix may still change.
CUT_MARGIN = 64
FIRST_PREFIX_ROWS = 256
# ROOM: more rows than those so far foretell, in case the next ones are shorter. MOST_GROWTH: at most this many times as
# many rows at once, in case they are longer.
ROOM, MOST_GROWTH = 1.05, 16


class DatasetSpec(BaseModel):
    """Which text to read: `{path = "wikitext2", split = "validation"}`, or just `"wikitext2"`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str  # a known name, a hub id, or a local .txt / .jsonl / .parquet file
    name: str | None = None  # hub configuration
    split: str | None = None
    revision: str | None = None
    text_column: str = "text"
    prompt: Prompt | None = None  # makes the text of a row from several columns, in place of text_column
    rows: str | None = None  # "start:stop", in rows or percent: "0:80", "50%:", ":10%"

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("rows")
    @classmethod
    def _check_rows(cls, rows: str | None) -> str | None:
        if rows is not None and not ROW_RANGE.fullmatch(rows):
            raise ValueError(f"rows is {rows!r}; it must be 'start:stop' in rows or percent, such as '0:80' or '50%:'")
        return rows

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Prompt | None, info: ValidationInfo) -> Prompt | None:
        path = info.data.get("path", "")
        if prompt is not None and (path in PYTHON_TEXTS or path.endswith(".txt")):
            raise ValueError(f"a prompt needs rows with columns; {path} has none")
        return prompt

    @property
    def label(self) -> str:
        """A short name for tables: `wikitext2`, `tinystories.txt[50%:]`, `wikitext/wikitext-103-raw-v1:test`."""
        label = Path(self.path).name + (f"/{self.name}" if self.name else "")
        label += f":{self.split}" if self.split else ""
        return label + (f"[{self.rows}]" if self.rows else "")


@dataclass(frozen=True)
class TextRows:
    """The rows of a text that a dataset names."""

    rows: Iterable[str]  # can be read once
    joiner: str  # between two rows that are read as one text
    documents: bool  # whether each row is tokenized by itself; see the head of this file
    source: str  # for messages: repository@revision configuration split[rows], or file[rows]


@dataclass(frozen=True)
class HubText:
    """A text on the Hugging Face Hub, and how the literature reads it."""

    repository: str
    revision: str = "main"
    name: str | None = None
    files: dict[str, str] | None = None  # the one file to read of a split that is too large
    evaluation: str = "test"  # the split; calibration reads "train"
    evaluation_rows: str | None = None
    text_column: str = "text"
    joiner: str = "\n\n"
    documents: bool = True
    stream: bool = False  # read rows from the network without downloading the whole split


HUB_TEXTS = {
    "wikitext2": HubText(
        "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-2-raw-v1", documents=False
    ),
    # GPTQ's revised c4 protocol, which later papers follow: the first 1100 validation documents, joined by a space.
    "c4": HubText(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        evaluation="validation",
        evaluation_rows=":1100",
        joiner=" ",
        stream=True,
    ),
    "slimpajama-6b": HubText("DKYoon/SlimPajama-6B", "b5f90f419b7489cdba26fdbc8c022fcb5562f968", stream=True),
    # The repository itself is a loading script, which `datasets` no longer runs; this branch has its rows as parquet.
    # Sentences joined by a space, train and test: GPTQ's revised ptb protocol.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only", "refs/convert/parquet", text_column="sentence", joiner=" ", documents=False
    ),
}
KNOWN_NAMES = (*HUB_TEXTS, *PYTHON_TEXTS)


def load_rows(spec: DatasetSpec, purpose: Purpose) -> TextRows:
    """Return the rows of a text. If `spec.split` is not set, `purpose` chooses the split of a known or hub text.

    Raises DataError, here or while the rows are read, if the text is unknown, unreachable, empty or lacks the column.
    """
    if spec.path in PYTHON_TEXTS:
        return _python_rows(spec, PYTHON_TEXTS[spec.path], purpose)
    if spec.path in HUB_TEXTS:
        return _hub_rows(spec, HUB_TEXTS[spec.path], purpose)
    if spec.path.startswith(("/", ".", "~")) or spec.path.endswith(FILE_SUFFIXES) or Path(spec.path).exists():
        return _file_rows(spec)
    if HUB_ID.fullmatch(spec.path):
        # Calibration reads a few rows of a text that may be very large; evaluation reads all of it, cached.
        return _hub_rows(spec, HubText(repository=spec.path, stream=purpose == "calibration"), purpose)
    known = f"known names are {', '.join(KNOWN_NAMES)}; or give a hub id (owner/name) or a .txt, .jsonl, .parquet file"
    raise DataError(f"unknown dataset {spec.path!r}; {known}{did_you_mean(spec.path, KNOWN_NAMES)}")


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: TextRows,
    num_samples: int,
    seq_len: int,
    asked_by: str = "calibration.num_samples",
) -> Tensor:
    """Return the first token windows of a text: int64, (num_samples, seq_len).

    The token ids of the rows, in order, are concatenated and cut every `seq_len`; nothing is sampled.
    Raises DataError if the text is too short; `asked_by` names the keys that num_samples comes from.
    """
    import torch

    needed = num_samples * seq_len
    ids: list[int] = []
    if text.documents:  # verbose=False: no warning about rows beyond the model's context, which are cut into windows
        for row in text.rows:
            ids += tokenizer(row, verbose=False)["input_ids"] if row.strip() else []
            if len(ids) >= needed:
                break
    else:
        ids = _running_ids(tokenizer, text, needed)
    if len(ids) < needed:
        raise DataError(
            f"text {text.source} yields {len(ids) // seq_len} windows of {seq_len} tokens; {asked_by} is {num_samples}"
        )
    return torch.tensor(ids[:needed], dtype=torch.int64).view(num_samples, seq_len)


def tokens_sha256(windows: Tensor) -> str:
    """Return the SHA-256, in hex, of an integer tensor's shape and values, both as little-endian int64."""
    import numpy as np

    shape = np.array(windows.shape, dtype="<i8")
    return hashlib.sha256(shape.tobytes() + windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _running_ids(tokenizer: PreTrainedTokenizerBase, text: TextRows, needed: int) -> list[int]:
    """Tokenize a prefix of the joined rows in one call, until it holds `needed` ids clear of its end.

    How many rows that takes follows from those so far: a text is tokenized little more than once.
    """
    rows = iter(text.rows)
    prefix = list(itertools.islice(rows, FIRST_PREFIX_ROWS))
    while True:
        ids = tokenizer(text.joiner.join(prefix), verbose=False)["input_ids"]
        missing = needed + CUT_MARGIN - len(ids)
        if missing <= 0:
            return ids
        foretold = math.ceil(ROOM * len(prefix) * missing / max(len(ids), 1))
        more = list(itertools.islice(rows, min(foretold, MOST_GROWTH * len(prefix))))
        if not more:
            return ids
        prefix += more


def _python_rows(spec: DatasetSpec, text: PythonText, purpose: Purpose) -> TextRows:
    _refuse(spec, "name", "revision", *(() if text.splits else ("split",)))
    split = spec.split or (text.splits[purpose == "evaluation"] if text.splits else None)
    if text.splits and split not in text.splits:
        raise DataError(f"dataset {spec.path} has the splits {' and '.join(text.splits)}; split is {split!r}")
    source = f"{text.source}{f' {split}' if split else ''}[{spec.rows or ':'}]"
    documents = text.read(split)
    return TextRows(_slice(lambda: documents, spec.rows, source), "\n\n", True, source)


def _hub_rows(spec: DatasetSpec, hub: HubText, purpose: Purpose) -> TextRows:
    import datasets

    hub = replace(hub, **spec.model_dump(include={"name", "revision", "text_column"}, exclude_unset=True))
    split = spec.split or ("train" if purpose == "calibration" else hub.evaluation)
    row_range = spec.rows or (hub.evaluation_rows if purpose == "evaluation" else None) or ":"
    source = " ".join(filter(None, (f"{hub.repository}@{hub.revision}", hub.name, f"{split}[{row_range}]")))
    if hub.stream and "%" in row_range:
        raise DataError(f"dataset {source} is streamed, so its length is unknown: give rows as numbers")
    with _reading(source, HubTextError, hub_out_of_reach()):
        records = datasets.load_dataset(
            hub.repository, hub.name, data_files=hub.files, split=split, revision=hub.revision, streaming=hub.stream
        )
    text_of = _text_of(spec.prompt, hub.text_column)
    rows = _slice(lambda: _texts(records, text_of, source), row_range, source)
    return TextRows(rows, hub.joiner, hub.documents, source)


def _file_rows(spec: DatasetSpec) -> TextRows:
    path = Path(spec.path).expanduser()
    if not path.exists():
        raise DataError(f"dataset file {path} does not exist")
    if not path.is_file() or path.suffix not in FILE_SUFFIXES:
        raise DataError(f"dataset {path} must be a .txt, .jsonl or .parquet file")
    _refuse(spec, "name", "split", "revision")
    if path.suffix == ".txt":
        with _reading(spec.label):
            # Not splitlines(): joining with "\n" must restore the file exactly.
            lines = _utf8(path.read_bytes()).split("\n")
        return TextRows(_slice(lambda: lines, spec.rows, spec.label), "\n", False, spec.label)
    text_of = _text_of(spec.prompt, spec.text_column)
    rows = _slice(lambda: _texts(_file_records(path), text_of, spec.label), spec.rows, spec.label)
    return TextRows(rows, "\n\n", True, spec.label)


def _file_records(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        with path.open("rb") as file:
            yield from (json.loads(_utf8(line)) for line in file if line.strip())


def _utf8(data: bytes) -> str:
    """UTF-8 text without a byte-order mark; Windows line ends become newlines."""
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def _texts(records: Iterable[Any], text_of: TextOf, source: str) -> Iterator[str]:
    """Yield the text of each record. Raises DataError for one that cannot be read or has no text."""
    with _reading(source):
        for number, record in enumerate(records):
            try:
                text = text_of(record if isinstance(record, dict) else {})
            except ValueError as error:
                raise DataError(f"dataset {source}, row {number}: {error}") from None
            if LONE_SURROGATE.search(text):
                raise DataError(f"dataset {source}, row {number}: a lone surrogate is not a character")
            yield text


def _text_of(prompt: Prompt | None, column: str) -> TextOf:
    return partial(column_text, column) if prompt is None else prompt.text


def _slice(read: Callable[[], Iterable[str]], row_range: str | None, source: str) -> Iterator[str]:
    """Yield the rows of a `start:stop`; a percentage p of n rows is row floor(p n / 100). `read` starts from row 0."""
    ends = (row_range or ":").split(":")
    total = sum(1 for _ in read()) if any("%" in end for end in ends) else 0
    start, stop = (total * int(end[:-1]) // 100 if end.endswith("%") else int(end) if end else None for end in ends)
    empty = True
    for row in itertools.islice(read(), start, stop):
        empty = False
        yield row
    if empty:
        raise DataError(f"dataset {source} is empty")


def _refuse(spec: DatasetSpec, *keys: str) -> None:
    for key in keys:
        if (value := getattr(spec, key)) is not None:
            raise DataError(f"dataset {spec.path} has no {key}; {key} is {value!r}: use rows to select a part of it")


@contextmanager
def _reading(source: str, kind: type[DataError] = DataError, out_of_reach: str | None = None) -> Iterator[None]:
    """out_of_reach: why a connection fails, in place of what the reader says of it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # hub, network, cache and parsers raise types with no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if out_of_reach is not None and isinstance(error, ConnectionError):
            reason = out_of_reach
        raise kind(f"dataset {source} cannot be read: {reason}") from error
