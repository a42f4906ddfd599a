"""Tokenizers as models come with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from huggingface_hub import constants

from lqer.errors import ModelError
from lqer.models.source import load_model_config, load_tokenizer, resolve_model

TEXT = "Every river finds the sea, although none of them was told where it lies."


@pytest.fixture
def folder(random_model, tmp_path) -> Path:
    random_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_sentencepiece_model_alone_is_a_tokenizer(folder, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join([TEXT] * 50), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, model_type="bpe",
        byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    shutil.copy(tmp_path / "tokenizer.model", folder / "tokenizer.model")
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == own.encode(TEXT)


@pytest.mark.parametrize(
    ("file", "read"), [("config.json", load_model_config), ("tokenizer_config.json", load_tokenizer)]
)
def test_code_that_comes_with_a_model_never_runs(folder, letter_tokenizer, monkeypatch, file, read):
    letter_tokenizer.save_pretrained(folder)
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")
    settings = json.loads((folder / file).read_text())
    settings |= {"auto_map": {"AutoConfig": "code.C", "AutoTokenizer": ["code.T", None]}, "model_type": "unheard-of"}
    settings |= {"tokenizer_class": "UnheardOf"}
    (folder / file).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("it asked"))
    source = resolve_model(str(folder))
    with pytest.raises(ModelError) as refused:
        read(source)
    assert len(str(refused.value).splitlines()) == 1
    assert not (folder / "ran").exists()


def test_a_damaged_tokenizer_is_one_line(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="has no usable tokenizer") as refused:
        load_tokenizer(resolve_model(str(folder)))
    assert len(str(refused.value).splitlines()) == 1


def test_a_tokenizer_is_saved_alike_with_a_network_and_without(folder, letter_tokenizer, tmp_path, monkeypatch):
    letter_tokenizer.save_pretrained(folder)
    for name, offline in (("with", False), ("without", True)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        load_tokenizer(resolve_model(str(folder))).save_pretrained(tmp_path / name)
    settings = (tmp_path / "with" / "tokenizer_config.json").read_text()
    assert settings == (tmp_path / "without" / "tokenizer_config.json").read_text()
    assert json.loads(settings) == json.loads((folder / "tokenizer_config.json").read_text())
