"""GGUF files that lie or are cut are refused by their name, without following what they announce."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from lqer.errors import ModelError
from lqer.models.gguf_header import check_gguf
from lqer.models.source import load_model_config, resolve_model


@pytest.fixture
def whole(tmp_path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_custom_alignment(64)
    for name in ("first", "second"):
        writer.add_tensor(name, np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "whole.gguf"


def test_a_whole_file_is_accepted(whole):
    check_gguf(whole)


def test_a_file_cut_anywhere_in_its_header_or_its_last_tensor_is_refused(whole):
    data = whole.read_bytes()
    for length in [*range(1, 400, 7), len(data) - 129]:
        whole.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"whole\.gguf is not a whole GGUF file"):
            check_gguf(whole)


def header(tensors: int, entries: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest + bytes(40)


def named(letter: bytes, form: str, *values: int) -> bytes:
    return struct.pack("<Q", 1) + letter + struct.pack(form, *values)


@pytest.mark.parametrize(("data", "message"), [
    (b"GGUF\3\0\0\0", "it ends after 8 bytes"),
    (b"GGML" + bytes(40), "does not begin with GGUF"),
    (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
    (header(2**60, 0), "declares"),
    (header(0, 2**60), "declares"),
    (header(0, 1, struct.pack("<Q", 2**63)), "within its header"),
    (header(0, 1, named(b"k", "<IIQ", 9, 4, 2**62)), "within its header"),
    (header(0, 1, named(b"k", "<IIQ", 9, 8, 2**62)), "within its header"),
    (header(0, 1, named(b"k", "<I", 99)), "a value of type 99"),
    (header(1, 0, named(b"t", "<I", 2**31)), "dimensions"),
    (header(1, 0, named(b"t", "<IQIQ", 1, 2**62, 0, 0)), "tensor t ends"),
    (header(1, 0, named(b"t", "<IQIQ", 1, 8, 999, 0)), "of type 999"),
])  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, data, message):
    file = tmp_path / "lies.gguf"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        check_gguf(file)
    with pytest.raises(ModelError, match=message):
        load_model_config(resolve_model(str(file)))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        check_gguf(tmp_path / "empty.gguf")
