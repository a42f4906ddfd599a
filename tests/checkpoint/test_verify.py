"""A checkpoint that is not what was written is refused by the name of the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lqer.checkpoint.load import load_quantized, open_verified
from lqer.checkpoint.pack import DETAILS_FILE, OUTSIDE_FILE
from lqer.checkpoint.verify import CheckpointFiles
from lqer.errors import ModelError
from lqer.store.names import block_file
from lqer.store.records import MANIFEST

CPU = torch.device("cpu")
FILES = [DETAILS_FILE, OUTSIDE_FILE, "config.json", "tokenizer.json", block_file(0), block_file(1)]


@pytest.fixture(scope="module")
def original(random_model, run_stages, plan) -> Path:
    return run_stages(random_model("llama"), plan).checkpoint.path


@pytest.fixture
def copied(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def test_a_copy_loads_as_the_original(original, copied, windows_WT):
    copy, model = load_quantized(copied, CPU), load_quantized(original, CPU)
    assert torch.equal(copy(windows_WT).logits, model(windows_WT).logits)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, become_a_folder])
def test_a_damaged_file_is_named(copied, file, damage):
    damage(copied / file)
    with pytest.raises(ModelError, match=file) as refused:
        load_quantized(copied, CPU)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("file", ["block-00007.safetensors", "chat_template.jinja", "model.safetensors"])
def test_an_extra_file_is_named(copied, file):
    (copied / file).write_bytes(b"")
    with pytest.raises(ModelError, match=rf"{file} is not a file of this checkpoint: remove it"):
        load_quantized(copied, CPU)


@pytest.mark.parametrize("file", ["README.md", ".gitattributes"])
def test_documents_and_hidden_files_may_be_added(copied, file):
    (copied / file).write_text("written later")
    load_quantized(copied, CPU)


def test_a_block_is_verified_when_it_is_read(copied):
    flip(copied / block_file(1))
    opened = open_verified(CheckpointFiles(copied), CPU, None, "auto")
    blocks = opened.loader.load_each(opened.blocks, range(2), CPU)
    next(blocks)
    with pytest.raises(ModelError, match=r"block-00001\.safetensors is damaged"):
        next(blocks)


@pytest.mark.parametrize("text", [None, "{}", "[]", "{", '{"files": 3}'])
def test_without_its_manifest_a_checkpoint_loads_only_unverified(copied, text):
    (copied / MANIFEST).unlink()
    if text is not None:
        (copied / MANIFEST).write_text(text)
    with pytest.raises(ModelError, match=r"manifest\.json is .*verify=False"):
        load_quantized(copied, CPU)
    load_quantized(copied, CPU, verify=False)


@pytest.mark.parametrize("file", [DETAILS_FILE, OUTSIDE_FILE, "config.json", block_file(1)])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_what_cannot_be_read_is_one_line_unverified_too(copied, file, damage):
    damage(copied / file)
    with pytest.raises(ModelError) as refused:
        load_quantized(copied, CPU, verify=False)
    assert len(str(refused.value).splitlines()) == 1
