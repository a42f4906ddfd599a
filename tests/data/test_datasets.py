"""Texts by name: which rows are read, how they are tokenized, and what is said when they cannot be."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from pydantic import BaseModel, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lqer.data.datasets import (
    FIRST_PREFIX_ROWS,
    HUB_TEXTS,
    DatasetSpec,
    HubText,
    calibration_windows,
    load_rows,
    tokens_sha256,
)
from lqer.errors import DataError

BOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, `w7` being 7 + 2; a BOS before every text that is tokenized by itself."""
    vocabulary = {"<unk>": 0, "<s>": BOS} | {f"w{i}": i + 2 for i in range(5000)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>", model_max_length=16)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def rows_of(path: object, purpose: str = "evaluation", **fields: str) -> list[str]:
    return list(load_rows(DatasetSpec(path=str(path), **fields), purpose).rows)


def windows_of(tokenizer: PreTrainedTokenizerFast, spec: DatasetSpec, num_samples: int, seq_len: int) -> torch.Tensor:
    return calibration_windows(tokenizer, load_rows(spec, "calibration"), num_samples, seq_len)


def failure(path: object, purpose: str = "evaluation", **fields: str) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, purpose, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestSpec:
    def test_a_string_is_a_path(self):
        class Section(BaseModel):
            dataset: DatasetSpec

        assert Section.model_validate({"dataset": "wikitext2"}).dataset == DatasetSpec(path="wikitext2")

    @pytest.mark.parametrize("rows", ["0:80", "50%:", ":10%", "10:90%", ":", "0%:100%"])
    def test_rows_are_named_by_numbers_or_percentages(self, rows):
        assert DatasetSpec(path="c4", rows=rows).rows == rows

    @pytest.mark.parametrize("rows", ["", "80", "-5:", "0:101%", "1:2:3", "0.5:", "a:b"])
    def test_what_is_no_row_range_is_refused(self, rows):
        with pytest.raises(ValidationError, match="start:stop"):
            DatasetSpec(path="c4", rows=rows)

    def test_an_unknown_key_is_refused(self):
        with pytest.raises(ValidationError, match="column"):
            DatasetSpec.model_validate({"path": "c4", "column": "text"})

    @pytest.mark.parametrize(
        ("fields", "label"),
        [
            ({"path": "wikitext2"}, "wikitext2"),
            ({"path": "/somewhere/tinystories.txt", "rows": "50%:"}, "tinystories.txt[50%:]"),
            ({"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1"}, "wikitext/wikitext-103-raw-v1"),
            ({"path": "c4", "split": "validation", "rows": ":9"}, "c4:validation[:9]"),
        ],
    )
    def test_a_label_tells_the_text_its_split_and_its_rows(self, fields, label):
        assert DatasetSpec(**fields).label == label


class TestFiles:
    @pytest.mark.parametrize("text", ["one\ntwo\n\nthree\n", "no newline at the end", "\rclassic\r", "\u2028\x0c\n"])
    def test_txt_is_given_back_as_it_is(self, tmp_path, text):
        (tmp_path / "a.txt").write_bytes(text.encode())
        read = load_rows(DatasetSpec(path=str(tmp_path / "a.txt")), "evaluation")
        assert read.joiner.join(read.rows) == text
        assert not read.documents
        assert read.source == "a.txt"

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
    def test_rows_are_those_of_the_file_whatever_its_kind(self, tmp_path, suffix):
        texts = [f"row {i}" for i in range(7)]
        path = tmp_path / f"a{suffix}"
        if suffix == ".txt":
            path.write_text("\n".join(texts))
        elif suffix == ".jsonl":
            path.write_text("\n".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            parquet.write_table(pyarrow.table({"text": texts, "id": range(7)}), path, row_group_size=2)
        assert rows_of(path) == texts
        assert rows_of(path, rows="2:5") == texts[2:5]
        assert rows_of(path, rows="5:99") == texts[5:]
        assert rows_of(path, rows=":50%") + rows_of(path, rows="50%:") == texts
        assert rows_of(path, rows=":50%") == texts[:3]

    def test_another_column_can_hold_the_text(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"content": "x"}')
        assert rows_of(tmp_path / "a.jsonl", text_column="content") == ["x"]
        message = failure(tmp_path / "a.jsonl", text_column="contents")
        assert message == "dataset a.jsonl, row 0: no column 'contents'; it has content; did you mean 'content'?"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"text": 3}', "column 'text' must hold text, not int"),
            ("a.jsonl", b'["x"]', "no column 'text'; it has none"),
            ("a.jsonl", b'{"text": "x"', "cannot be read: Expecting"),
            ("a.txt", b"\xff\xfe", "cannot be read: 'utf-8' codec"),
            ("a.parquet", b"no parquet", "cannot be read: "),
            ("a.jsonl", b"\n", "dataset a.jsonl is empty"),
            ("a.csv", b"text\nx\n", "must be a .txt, .jsonl or .parquet file"),
        ],
    )
    def test_what_cannot_be_read_is_refused_with_the_reason(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        assert message in failure(tmp_path / name)

    def test_a_range_without_rows_is_refused(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
        assert failure(path, rows="2:") == "dataset a.jsonl[2:] is empty"
        assert failure(path, rows="1:0") == "dataset a.jsonl[1:0] is empty"

    def test_paths_that_are_no_dataset_are_refused(self, tmp_path):
        assert failure(tmp_path / "none.txt") == f"dataset file {tmp_path}/none.txt does not exist"
        assert "does not exist" in failure("none.jsonl")
        assert "must be a .txt" in failure(tmp_path)

    def test_a_file_has_no_split(self, tmp_path):
        assert "has no split; split is 'test'" in failure(write_jsonl(tmp_path / "a.jsonl", ["x"]), split="test")


class TestKnownNames:
    def test_an_unknown_name_is_answered_with_the_nearest(self):
        message = failure("wikitext-2")
        assert message.startswith("unknown dataset 'wikitext-2'; known names are wikitext2, c4,")
        assert message.endswith("did you mean 'wikitext2'?")

    @pytest.mark.parametrize("name", HUB_TEXTS)
    def test_revisions_are_pinned(self, name):
        assert re.fullmatch(r"[0-9a-f]{40}|refs/convert/parquet", HUB_TEXTS[name].revision)

    def test_the_splits_of_pydoc_share_no_topic(self):
        train, test = rows_of("pydoc", "calibration"), rows_of("pydoc", "evaluation")
        assert not set(train) & set(test)
        assert 0.35 < len("".join(train)) / len("".join(train + test)) <= 0.5
        assert rows_of("pydoc", "evaluation", split="train", rows="1:3") == train[1:3]
        source = load_rows(DatasetSpec(path="pydoc", rows=":9"), "calibration").source
        assert source == f"pydoc topics of Python {platform.python_version()} train[:9]"
        assert (
            failure("pydoc", split="validation") == "dataset pydoc has the splits train and test; split is 'validation'"
        )
        assert "has no revision" in failure("pydoc", revision="main")

    def test_stdlib_is_the_source_of_modules_in_a_mixed_order(self):
        modules = rows_of("stdlib", "evaluation")
        assert len(modules) > 100
        names = [Path(os.__file__).with_name(f"{name}.py") for name in ("abc", "ast", "bdb")]
        places = [modules.index(path.read_text(encoding="utf-8")) for path in names]
        assert max(places) - min(places) > 3
        assert rows_of("stdlib", "calibration", rows=":40") == modules[:40]
        assert "stdlib has no split" in failure("stdlib", split="test")


class TestHub:
    """A folder stands in for a repository: the datasets library reads both alike."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "repository"
        folder.mkdir()
        for split, count in (("train", 6), ("test", 4)):
            texts = [f"{split} {i}" for i in range(count)]
            parquet.write_table(pyarrow.table({"sentence": texts}), folder / f"{split}.parquet")
        return folder

    @pytest.mark.parametrize("stream", [True, False])
    def test_split_rows_and_column_are_those_asked_for(self, folder, monkeypatch, stream):
        hub = HubText(str(folder), evaluation_rows=":2", text_column="sentence", joiner=" ", stream=stream)
        monkeypatch.setitem(HUB_TEXTS, "tiny", hub)
        assert rows_of("tiny", "calibration", rows="1:3") == ["train 1", "train 2"]
        read = load_rows(DatasetSpec(path="tiny"), "evaluation")
        assert read.joiner.join(read.rows) == "test 0 test 1"
        assert read.source == f"{folder}@main test[:2]"
        assert rows_of("tiny", "evaluation", rows=":") == [f"test {i}" for i in range(4)]
        assert rows_of("tiny", "evaluation", split="train", rows="5:") == ["train 5"]
        assert "no column 'text'; it has sentence" in failure("tiny", text_column="text")
        assert re.search(r"cannot be read: .*validation", failure("tiny", split="validation"))

    def test_percentages_of_a_streamed_text_are_refused(self, folder, monkeypatch):
        hub = HubText(str(folder), text_column="sentence")
        monkeypatch.setitem(HUB_TEXTS, "tiny", hub)
        assert rows_of("tiny", rows="50%:") == ["test 2", "test 3"]
        monkeypatch.setitem(HUB_TEXTS, "tiny", HubText(str(folder), text_column="sentence", stream=True))
        assert "give rows as numbers" in failure("tiny", rows="50%:")

    def test_without_a_network_texts_of_the_hub_are_refused_in_one_line(self, tmp_path):
        code = (
            "from lqer.data.datasets import DatasetSpec, load_rows\n"
            "for path in ('c4', 'wikitext2', 'nobody/nothing'):\n"
            "    try: load_rows(DatasetSpec(path=path), 'calibration')\n"
            "    except Exception as error: print(type(error).__name__, error)\n"
        )
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        lines = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        ).stdout.splitlines()
        names = ["allenai/c4", "Salesforce/wikitext", "nobody/nothing"]
        assert len(lines) == 3
        for line, name in zip(lines, names):
            assert re.match(rf"HubTextError dataset {name}@\w+ .*cannot be read: ", line)


class TestWindows:
    def test_documents_are_tokenized_one_by_one(self, tmp_path, tokenizer):
        path = write_jsonl(tmp_path / "a.jsonl", ["w0 w1 w2", "", "w3", " \n", "w4 w5", "w6"])
        windows = windows_of(tokenizer, DatasetSpec(path=str(path)), 2, 4)
        assert windows.tolist() == [[BOS, 2, 3, 4], [BOS, 5, BOS, 6]]
        assert windows.dtype == torch.int64

    def test_lines_are_tokenized_as_one_text(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("w0 w1 w2\n\nw3\nw4 w5\nw6")
        windows = windows_of(tokenizer, DatasetSpec(path=str(tmp_path / "a.txt")), 2, 4)
        assert windows.tolist() == [[BOS, 2, 3, 4], [5, 6, 7, 8]]

    def test_a_long_running_text_has_one_start(self, tmp_path, tokenizer):
        words = [f"w{i}" for i in range(3 * FIRST_PREFIX_ROWS)]
        (tmp_path / "a.txt").write_text("\n".join(words))
        windows = windows_of(tokenizer, DatasetSpec(path=str(tmp_path / "a.txt")), 3, FIRST_PREFIX_ROWS)
        assert windows.flatten().tolist() == tokenizer(" ".join(words))["input_ids"][:-1]

    @pytest.mark.parametrize("words_per_row", [[4], [1, 9], [9, 1]])
    def test_a_running_text_is_tokenized_little_more_than_once(self, tmp_path, tokenizer, monkeypatch, words_per_row):
        """Rows of other lengths may follow those that the rest is foretold from."""
        lengths = [length for length in words_per_row for _ in range(8 * FIRST_PREFIX_ROWS)]
        (tmp_path / "a.txt").write_text("\n".join(" ".join(["w1"] * length) for length in lengths))
        needed, seen = sum(lengths) * 3 // 4, []
        encode = type(tokenizer).__call__

        def counted(self, text, **options):
            seen.append(len(text.split()))
            return encode(self, text, **options)

        monkeypatch.setattr(type(tokenizer), "__call__", counted)
        assert windows_of(tokenizer, DatasetSpec(path=str(tmp_path / "a.txt")), 1, needed).shape == (1, needed)
        assert sum(seen) < 2.5 * needed

    def test_rows_beyond_the_last_window_are_not_read(self, tmp_path, tokenizer):
        path = write_jsonl(tmp_path / "a.jsonl", ["w0 w1", "w2 w3"])
        with path.open("a") as file:
            file.write("broken")
        assert windows_of(tokenizer, DatasetSpec(path=str(path)), 3, 2).shape == (3, 2)
        with pytest.raises(DataError, match="cannot be read"):
            windows_of(tokenizer, DatasetSpec(path=str(path)), 4, 2)

    def test_a_text_of_too_few_windows_is_refused(self, tmp_path, tokenizer):
        path = write_jsonl(tmp_path / "a.jsonl", ["w0 w1 w2"] * 5)
        message = "text a.jsonl[1:] yields 5 windows of 3 tokens; calibration.num_samples is 6"
        with pytest.raises(DataError, match=re.escape(message)):
            windows_of(tokenizer, DatasetSpec(path=str(path), rows="1:"), 6, 3)

    def test_the_first_windows_do_not_depend_on_their_number(self, assets):
        llama = AutoTokenizer.from_pretrained(assets / "models/stories15M")
        spec = DatasetSpec(path=str(assets / "text/tinystories/tinystories.txt"))
        whole = llama(Path(spec.path).read_text(), verbose=False)["input_ids"]
        for num_samples in (1, 8, 100):
            windows = windows_of(llama, spec, num_samples, 256)
            assert windows.flatten().tolist() == whole[: num_samples * 256]


def test_tokens_sha256_is_that_of_little_endian_int64():
    windows = torch.tensor([[1, 2, 3], [4, 5, 49151]])
    expected = hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 49151)).hexdigest()
    assert tokens_sha256(windows) == tokens_sha256(windows.int()) == expected
    assert tokens_sha256(windows.view(3, 2)) != expected


class TestEncodings:
    TEXT = "One line.\nAnother one.\n"

    def rows(self, path, data: bytes) -> list[str]:
        path.write_bytes(data)
        return list(load_rows(DatasetSpec(path=str(path)), "evaluation").rows)

    def test_a_byte_order_mark_and_windows_line_ends_are_not_text(self, tmp_path):
        plain = self.rows(tmp_path / "plain.txt", self.TEXT.encode())
        assert self.rows(tmp_path / "marked.txt", b"\xef\xbb\xbf" + self.TEXT.encode()) == plain
        assert self.rows(tmp_path / "windows.txt", self.TEXT.replace("\n", "\r\n").encode()) == plain

    def test_a_byte_order_mark_of_a_jsonl_is_not_part_of_its_first_record(self, tmp_path):
        assert self.rows(tmp_path / "marked.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n') == ["a", "b"]

    def test_another_encoding_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"cannot be read: 'utf-8' codec"):
            self.rows(tmp_path / "other.txt", self.TEXT.encode("utf-16"))

    def test_half_of_a_surrogate_pair_is_refused_by_its_row(self, tmp_path):
        with pytest.raises(DataError, match="row 1: a lone surrogate is not a character"):
            self.rows(tmp_path / "half.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n')
